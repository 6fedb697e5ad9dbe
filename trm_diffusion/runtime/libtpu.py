"""The TPU compiler without a TPU: where libtpu is, how it gets there, and programs that run with it.

libtpu takes over the process that loads it, and writes much to its terminal; so it is kept out of the environment of
the package, and runs in a process of its own. Only one process of a machine may hold it at a time: others wait.
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

DIRECTORY = "TRM_LIBTPU"  # environment variable: a directory into which libtpu was installed with pip --target
REQUIREMENTS = Path(__file__).parents[2] / "requirements-tpu-compile.txt"
LOCK = Path(tempfile.gettempdir()) / f"trm_diffusion_libtpu_{os.getuid()}.lock"


def find_libtpu(*, install: bool) -> Path:
    """The directory that holds libtpu: the one that TRM_LIBTPU names, this environment's, or one of the user's cache.

    install: put the version of requirements-tpu-compile.txt into the cache where it is not there yet. Raises UserError
    where there is none.
    """
    if named := os.environ.get(DIRECTORY):
        if not (Path(named) / "libtpu").is_dir():
            raise UserError(f"{DIRECTORY}={named} holds no libtpu; pip install --target it there, or leave it unset")
        return Path(named)
    if spec := importlib.util.find_spec("libtpu"):
        return Path(spec.origin).parents[1]
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else []
    pinned = next((line for line in lines if line.startswith("libtpu==")), None)
    if pinned is None:
        raise UserError(f"no {REQUIREMENTS}, which says which libtpu to install; set {DIRECTORY}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "trm_diffusion" / pinned.replace("==", "-")
    if directory.is_dir():
        return directory
    if not install:
        raise UserError(f"no libtpu; python -m trm_diffusion.main --mode=compile installs it, or set {DIRECTORY}")
    _install(pinned, directory)
    return directory


def _install(pinned: str, directory: Path) -> None:
    say(f"installing {pinned}, the TPU compiler, into {directory}, once")
    with _alone():
        if directory.is_dir():  # another process was quicker
            return
        with replacing(directory) as target:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(target)]
            pip = [sys.executable, "-m", "pip", "install", *options, "-r", str(REQUIREMENTS)]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise UserError(
                    f"the TPU compiler {pinned} could not be installed ({reason}); where there is no network, install "
                    f"it elsewhere with pip --target and set {DIRECTORY}"
                )


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """Waits for its turn. The turn lasts as long as any process has the file descriptor that it gives."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process holds the TPU compiler; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run_with_libtpu(arguments: Sequence[str], request: dict | None = None, *, install: bool = False) -> dict:
    """The last line that `python ARGUMENTS` prints, as JSON, run where libtpu can be imported.

    request: what it is given, as JSON, on its standard input. Raises UserError where there is no libtpu, or with the
    program's own reason where that prints {"error": reason}; RuntimeError where it fails otherwise.
    """
    path = os.pathsep.join(filter(None, [str(find_libtpu(install=install)), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # of the machine that this runs on
    with _alone() as turn:  # the child keeps it, should this process be killed
        child = subprocess.run(
            [sys.executable, *arguments],
            input=json.dumps(request),
            env=environment,
            pass_fds=(turn,),
            capture_output=True,
            text=True,
        )
    if child.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{child.stderr[-2000:]}")
    result = json.loads(child.stdout.splitlines()[-1])
    if error := result.get("error"):
        raise UserError(error)
    return result
