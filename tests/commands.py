"""Command lines taken apart and checked as `main` does it, with the jobs themselves left out."""

import json
import os
import subprocess
import sys

# Each command runs in a fork of one process that has imported everything, so that many are quick.
_RUNNER = """
import json, os, shlex, sys
import jax
from jax._src import xla_bridge
import trm_diffusion.main as main
from trm_diffusion import analyze, compare, compile_ahead, convert, evaluate, evaluate_images, export, prepare, sample
from trm_diffusion import train, verify
from trm_diffusion.runtime import doctor
for module in (
    train, sample, evaluate, analyze, export, compare, convert, evaluate_images, prepare, verify, doctor, compile_ahead
):
    for job in {module.__name__.rpartition(".")[2], "make_reference"} & vars(module).keys():
        setattr(module, job, lambda *_, job=job, **__: print("reached", job, file=sys.stderr, flush=True) or True)
for arguments in json.loads(sys.stdin.read()):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        sys.argv = ["main", *shlex.split(arguments)]
        code = main.main(sys.argv)
        print(f"devices touched: {xla_bridge.backends_are_initialized()}", file=sys.stderr, flush=True)
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


def parsed(commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and error text of `python -m trm_diffusion.main COMMAND` for each, up to where a job would begin."""
    result = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]
