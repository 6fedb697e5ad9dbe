"""Command lines run as `python -m` runs them: with the jobs themselves left out, or in earnest."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Each command runs in a fork of one process that has imported everything, so that many are quick.
_RUNNER = """
import json, os, runpy, sys, traceback
import jax
from absl import flags
from jax._src import xla_bridge
from trm_diffusion.jobs import analyze, compare, compile_ahead, convert_weights, doctor, encode_text, evaluate
from trm_diffusion.jobs import evaluate_images, export_images, export_prompts, prepare_latents, sample
from trm_diffusion.jobs import train, verify_data
from trm_diffusion.runtime import processes
JOBS = (
    train, sample, evaluate, analyze, export_images, export_prompts, compare, convert_weights, evaluate_images,
    prepare_latents, encode_text, verify_data, doctor, compile_ahead,
)

def leave_out_jobs():
    processes.join = lambda *_, **__: None
    processes.several = lambda: flags.FLAGS.is_parsed() and bool(flags.FLAGS.coordinator)
    for module in JOBS:
        name = module.__name__.rpartition(".")[2]
        named = {name.partition("_")[0], name, "make_reference"}
        for job in named & vars(module).keys():
            setattr(module, job, lambda *_, job=job, **__: print("reached", job, file=sys.stderr, flush=True) or True)

def exit_code(module, arguments):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        return exit.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

exec(sys.argv[1])
for module, arguments in json.loads(sys.stdin.read()):
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
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


def parsed(commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and output of `python -m trm_diffusion.main COMMAND` for each, up to where a job would begin."""
    return ran([f"python -m trm_diffusion.main {command}" for command in commands], before="leave_out_jobs()")


def ran(commands: list[str], directory: Path | None = None, before: str = "") -> list[tuple[int, str]]:
    """Exit code and output of each `python -m MODULE ...`, run one after another in `directory`.

    before: what the process does first of which all are forks; it must leave JAX's devices alone.
    """
    words = [shlex.split(command) for command in commands]
    assert all(command[:2] == ["python", "-m"] for command in words), commands
    result = subprocess.run(
        [sys.executable, "-c", _RUNNER, before],
        input=json.dumps([[module, arguments] for _, _, module, *arguments in words]),
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]
