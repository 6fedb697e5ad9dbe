"""What records are made from, so that a cache and a run notice when their data change under the same names.

The origin of a record is a line "SIZE TIME SHA256": bytes and modification time (ns) of its files, and the start of a
hash of its own bytes. Bytes are hashed again only if the size or the time differs.
"""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trm_diffusion.data.base import Source
from trm_diffusion.files import sha256

READERS = 16  # threads that ask a file system, which may be far away
AT_ONCE = 1024  # records that a thread asks for
DIGITS = 32  # of the hash


def origin_of(source: Source, index: int) -> str:
    """The origin of a record; "" if it is in no file of its own, or that cannot be read."""
    try:
        stat = _stat(source.files(index))
        return f"{stat[0]} {stat[1]} {_digest(source, index)}" if stat else ""
    except OSError:
        return ""


def changed(source: Source, indices: Sequence[int], origins: Sequence[str]) -> list[int]:
    """The records whose bytes are not those of their origin. One without an origin counts as unchanged."""

    def differs(index: int, origin: str) -> bool:
        if not origin:
            return False
        *stat, digest = origin.split()
        try:
            now = _stat(source.files(index))
            return now is None or ([str(value) for value in now] != stat and _digest(source, index) != digest)
        except OSError:
            return True

    with ThreadPoolExecutor(READERS) as readers:
        flags = readers.map(differs, indices, origins)
        return [index for index, flag in zip(indices, flags, strict=True) if flag]


def stats_of(source: Source) -> np.ndarray:
    """Size and modification time of every record's files, int64 [N, 2]; [0, 2] if they are in no files."""
    if not source.files(0):
        return np.zeros((0, 2), np.int64)

    def stats(indices: range) -> list:
        seen = functools.lru_cache(maxsize=4)(os.stat)  # neighbours may share a file
        return [_stat(source.files(index), seen) for index in indices]

    parts = [range(first, min(first + AT_ONCE, len(source))) for first in range(0, len(source), AT_ONCE)]
    with ThreadPoolExecutor(READERS) as readers:
        return np.array([stat for part in readers.map(stats, parts) for stat in part], np.int64)


def first_few(names: Sequence[str], unit: str = "record", shown: int = 3) -> str:
    """ "2 records (a, b)", or with the first `shown` names and dots."""
    dots = ", ..." if len(names) > shown else ""
    return f"{len(names)} {unit}{'s' if len(names) > 1 else ''} ({', '.join(names[:shown])}{dots})"


def _stat(files: Sequence[str], stat=os.stat) -> tuple[int, int] | None:
    """Total size and last modification time (ns); None without files."""
    found = [stat(file) for file in files]
    return (sum(one.st_size for one in found), max(one.st_mtime_ns for one in found)) if found else None


def _digest(source: Source, index: int) -> str:
    return sha256([source.content(index)])[:DIGITS]
