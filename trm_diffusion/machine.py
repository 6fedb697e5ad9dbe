"""Which machine this is, and whether a process of it is alive."""

import functools
import hashlib
import pathlib


@functools.cache
def machine() -> str:
    """An id of everything within which process ids are unique: a host since its boot, or one container on it."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    processes = pathlib.Path("/proc/self/ns/pid").readlink()
    return hashlib.sha256(f"{boot} {processes}".encode()).hexdigest()[:12]


def started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it is dead.

    A process id may be used again; together with this time it is unique.
    """
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if state in "ZX" else int(fields[18])
