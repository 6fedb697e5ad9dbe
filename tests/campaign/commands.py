"""Commands in forks of this process, within limits of time and memory, and what came of them."""

import contextlib
import ctypes
import importlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tests import conftest  # noqa: F401  its environment, before JAX is imported
from tests.forks import JOBS, exit_code

SECONDS = 300  # a command that takes longer hangs; on a quiet machine the usual one takes three
PR_SET_PDEATHSIG = 1  # of Linux's prctl
BYTES = 3 * 2**30  # address space beyond this process's own
RESIDENT = 2 * 2**30  # bytes


class Outcome(NamedTuple):
    code: int | None  # the exit code, minus the signal that ended it, or None if it took too long
    output: str  # stdout and stderr
    peak: int  # resident bytes

    @property
    def error(self) -> str:
        """The line that explains exit code 2, or ""."""
        lines = self.output.strip().splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        return found[0] if found else ""

    def fault(self, codes: tuple[int, ...] = (0, 2)) -> str:
        """What must never happen, in words, or "": a hang, a traceback, another exit code, or 2 without its line."""
        if self.code is None:
            return "hangs"
        if "Traceback (most recent call last)" in self.output or self.code not in codes:
            lines = self.output.strip().splitlines()
            raised = [line for line in lines if ("Error" in line or "Exception" in line) and not line.startswith(" ")]
            return f"exit {self.code}: {([*raised, *lines[-1:], 'no output'])[0][:300]}"
        if self.code == 2 and not self.error:
            return f"exit 2 without its line: {self.output.strip()[-200:]}"
        if self.peak > RESIDENT:
            return f"took {self.peak / 2**30:.1f} GiB"
        return ""


def import_all() -> None:
    """Imports every job, so that a fork need not."""
    for name in JOBS:
        importlib.import_module(f"trm_diffusion.jobs.{name}")
    import array_record.python.array_record_module  # noqa: F401
    import PIL.Image  # noqa: F401


def run(module: str, *arguments: str, before: Callable[[], None] | None = None) -> Outcome:
    """Runs `python -m MODULE ARGUMENTS`; `before` is called in its process first."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it has a session of its own
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + BYTES,) * 2)
        if before:
            before()
        code = exit_code(module, list(arguments))
        sys.stdout.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(os.pidfd_open(child), "rb", buffering=0) as process, os.fdopen(reader, "rb", buffering=0) as pipe:
        in_time, chunks = _read(pipe, process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and whatever it has started
        _, status, usage = os.wait4(child, 0)
        os.set_blocking(reader, False)
        chunks.append(pipe.readall() or b"")
    text = b"".join(chunks).decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status) if in_time else None, text, usage.ru_maxrss * 1024)


def _read(pipe, process) -> tuple[bool, list[bytes]]:
    """Whether the process ends in time, and what it writes until then."""
    chunks, end = [], time.monotonic() + SECONDS
    while ready := select.select([pipe, process], [], [], max(0.0, end - time.monotonic()))[0]:
        chunk = pipe.read(2**16) if pipe in ready else b""
        chunks.append(chunk)
        if process in ready and not chunk:
            return True, chunks
        if not chunk:  # it has closed its output before its end
            return bool(select.select([process], [], [], max(0.0, end - time.monotonic()))[0]), chunks
    return False, chunks


def succeed(module: str, *arguments: str, before: Callable[[], None] | None = None) -> str:
    """The output of a command that must succeed, because other cases build on it."""
    outcome = run(module, *arguments, before=before)
    assert outcome.code == 0, f"python -m {module} {' '.join(arguments)}\n{outcome.output[-3000:]}"
    return outcome.output


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
