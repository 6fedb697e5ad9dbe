"""Points at which a process is killed or asked to stop, counted so that every run meets the same ones.

An operation is a call by which Python changes the file system below a directory: open for writing, mkdir, rename,
remove, rmdir, truncate, fsync. Libraries in C++ write files unseen; the size of a file counts their bytes.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Point(NamedTuple):
    number: int  # of the operation, from 1; or the largest size of a file in bytes
    # "kill", "stop": SIGKILL, SIGTERM just before the operation. "cut", "full": a file that would grow beyond the size
    # ends the process, or its writes fail as on a full disk. "count": nothing.
    how: str

    def __str__(self) -> str:
        unit = "byte" if self.how in ("cut", "full") else "operation"
        return f"{self.how} at {unit} {self.number}"


def watch(directory: Path, point: Point) -> Callable[[], None]:
    """What to call in a process so that it ends at the point; prints each operation with how="count"."""
    return lambda: _watch(str(directory), point)


def _watch(directory: str, point: Point) -> None:
    if point.how in ("cut", "full"):
        # Ends the process if it is not ignored, which is Python's way.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if point.how == "cut" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (point.number,) * 2)
        return
    count = 0

    def seen(name: str) -> None:
        nonlocal count
        count += 1
        if point.how == "count":
            print(f"operation: {name}", flush=True)
        elif count == point.number:
            os.kill(os.getpid(), signal.SIGKILL if point.how == "kill" else signal.SIGTERM)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & WRITES
        else:
            changes, path = event in CHANGES, arguments[0] if arguments else None
        if changes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(directory):
            seen(f"{event} {os.fspath(path)[len(directory) :]}")

    fsync = os.fsync

    def synchronise(descriptor) -> None:
        seen("fsync")
        fsync(descriptor)

    os.fsync = synchronise
    sys.addaudithook(hook)
