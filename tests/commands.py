"""Runs command lines as `python -m` does, either completely or with the jobs themselves left out."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def parsed(commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and output of each `python -m trm_diffusion.main COMMAND`, up to the start of its job."""
    return ran([f"python -m trm_diffusion.main {command}" for command in commands], jobs=False)


def ran(
    commands: list[str], directory: Path | None = None, *, jobs: bool = True, mock_images: int = 0
) -> list[tuple[int, str]]:
    """Exit code and output of each `python -m MODULE ...`, run one after another in `directory`.

    jobs: if False, each job only prints "reached JOB".
    mock_images: TFDS serves this many random images for any data set.
    """
    words = [shlex.split(command) for command in commands]
    assert all(command[:2] == ["python", "-m"] for command in words), commands
    options = ([] if jobs else ["--without_jobs"]) + ([f"--mock_images={mock_images}"] if mock_images else [])
    result = subprocess.run(
        [sys.executable, "-m", "tests.forks", *options],
        input=json.dumps([[module, arguments] for _, _, module, *arguments in words]),
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]
