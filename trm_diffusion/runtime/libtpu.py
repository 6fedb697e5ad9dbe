"""The TPU compiler without a TPU: finds or installs libtpu, and runs programs with it.

libtpu takes over the process that loads it and prints a lot. It is therefore kept out of the package's environment and
runs in a process of its own. Only one process per machine can use it at a time; others wait.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from trm_diffusion.errors import UserError
from trm_diffusion.files import replacing
from trm_diffusion.runtime.logging import say

DIRECTORY = "TRM_LIBTPU"  # environment variable: a directory where pip --target installed libtpu
REQUIREMENTS = Path(__file__).parents[2] / "requirements-tpu-compile.txt"
LOCK = Path(tempfile.gettempdir()) / f"trm_diffusion_libtpu_{os.getuid()}.lock"


def find_libtpu(*, install: bool) -> Path:
    """The directory that contains libtpu: from TRM_LIBTPU, this environment, or the user's cache, in this order.

    install: if the cache lacks it, install the version that requirements-tpu-compile.txt pins. Raises UserError if
    there is no libtpu.
    """
    if named := os.environ.get(DIRECTORY):
        if not (Path(named) / "libtpu").is_dir():
            raise UserError(f"{DIRECTORY}={named} contains no libtpu; install it there with pip --target, or unset it")
        return Path(named)
    if spec := importlib.util.find_spec("libtpu"):
        return Path(spec.origin).parents[1]
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else []
    pinned = next((line for line in lines if line.startswith("libtpu==")), None)
    if pinned is None:
        raise UserError(f"{REQUIREMENTS} is missing or pins no libtpu version to install; set {DIRECTORY}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "trm_diffusion" / pinned.replace("==", "-")
    if directory.is_dir():
        return directory
    if not install:
        raise UserError(f"no libtpu; python -m trm_diffusion.main --mode=compile installs it, or set {DIRECTORY}")
    _install(pinned, directory)
    return directory


def _install(pinned: str, directory: Path) -> None:
    say(f"installing {pinned}, the TPU compiler, into {directory} (only once)")
    with _libtpu_lock():
        if directory.is_dir():  # another process has installed it meanwhile
            return
        with replacing(directory) as target:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(target)]
            pip = [sys.executable, "-m", "pip", "install", *options, "-r", str(REQUIREMENTS)]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise UserError(
                    f"the TPU compiler {pinned} could not be installed ({reason}); without a network, install "
                    f"it elsewhere with pip --target and set {DIRECTORY}"
                )


@contextlib.contextmanager
def _libtpu_lock() -> Iterator[int]:
    """Waits for the lock and yields its file descriptor. It is locked as long as any process has that descriptor."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is using the TPU compiler; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run_with_libtpu(arguments: Sequence[str], request: dict | None = None, *, install: bool = False) -> dict:
    """Runs `python ARGUMENTS` with libtpu on its path; returns the last line it prints, parsed as JSON.

    request: passed as JSON on standard input. Raises UserError if there is no libtpu, or with the program's reason if
    it prints {"error": reason}; RuntimeError if it fails otherwise.
    """
    path = os.pathsep.join(filter(None, [str(find_libtpu(install=install)), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # meant for this machine's devices
    with _libtpu_lock() as lock:  # the child holds it too, in case this process is killed
        child = subprocess.run(
            [sys.executable, *arguments],
            input=json.dumps(request),
            env=environment,
            pass_fds=(lock,),
            capture_output=True,
            text=True,
        )
    if child.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{child.stderr[-2000:]}")
    result = json.loads(child.stdout.splitlines()[-1])
    if error := result.get("error"):
        raise UserError(error)
    return result
