"""Runs commands, each in a fork of one process that has imported everything, which makes many commands fast.

    python -m tests.forks [--without_jobs] [--mock_images=N] < COMMANDS

--mock_images: TFDS serves this many random images for any data set.
COMMANDS: a JSON list of [module, arguments]. Prints a JSON line for each: its exit code and its whole output.
"""

import argparse
import importlib
import json
import os
import runpy
import sys
import traceback

import jax  # noqa: F401  imported once, before the forks
from absl import flags
from jax._src import xla_bridge

from trm_diffusion.readers import paths
from trm_diffusion.runtime import processes

JOBS = {  # module of trm_diffusion/jobs: its jobs
    "train": ("train",),
    "sample": ("sample",),
    "evaluate": ("evaluate",),
    "analyze": ("analyze",),
    "trace": ("trace",),
    "export_images": ("export",),
    "export_prompts": ("export_prompts",),
    "prepare_latents": ("prepare",),
    "encode_text": ("encode",),
    "verify_data": ("verify",),
    "evaluate_images": ("evaluate_images", "make_reference"),
    "compare": ("compare",),
    "convert_weights": ("convert",),
    "compile_ahead": ("compile_ahead",),
    "doctor": ("doctor",),
}


def leave_out_jobs() -> None:
    """Makes each job only print that it was reached, connects no processes, and takes buckets for readable."""
    paths.is_installed = lambda package: True
    processes.join = lambda *_, **__: None
    processes.barrier = lambda *_: None
    processes.is_distributed = lambda: flags.FLAGS.is_parsed() and bool(flags.FLAGS.coordinator)
    for name, jobs in JOBS.items():
        module = importlib.import_module(f"trm_diffusion.jobs.{name}")
        for job in jobs:
            assert callable(getattr(module, job))
            setattr(module, job, lambda *_, job=job, **__: print("reached", job, file=sys.stderr, flush=True) or True)


def exit_code(module: str, arguments: list[str]) -> int:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        return exit.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def in_a_fork(module: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of one command; the last line says whether it touched JAX's devices."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        code = exit_code(module, arguments)
        print(f"devices touched: {xla_bridge.backends_are_initialized()}", flush=True)
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


if __name__ == "__main__":
    for name in JOBS:
        importlib.import_module(f"trm_diffusion.jobs.{name}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--without_jobs", action="store_true")
    parser.add_argument("--mock_images", type=int, default=0)
    options = parser.parse_args()
    if options.without_jobs:
        leave_out_jobs()
    if options.mock_images:
        import tensorflow_datasets

        mock = tensorflow_datasets.testing.mock_data(num_examples=options.mock_images)
        mock.__enter__()  # `mock` stays referenced: collected, it would end
    for module, arguments in json.loads(sys.stdin.read()):
        print(json.dumps(in_a_fork(module, arguments)), flush=True)
