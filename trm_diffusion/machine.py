"""Which machine this is, and whether a process of it is alive."""

import contextlib
import functools
import hashlib
import os
import pathlib
import socket


@functools.cache
def machine() -> str:
    """An id of everything within which process ids are unique: a host since its boot, or one container on it."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name = f"{boot} {pathlib.Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it is dead.

    A process id may be used again; together with this time it is unique. Where there is no /proc, the time is 0.
    """
    if not pathlib.Path("/proc/self/stat").exists():
        with contextlib.suppress(PermissionError):  # another user's
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return None
        return 0
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if state in "ZX" else int(fields[18])
