"""Atomic writes of files and directories, and checksums.

A file is written next to its final place under a hidden name, `.NAME.partial-MACHINE-PID`, and renamed when it is
complete. So a reader never sees half a file, and the leftovers of a killed job can be recognised by their names.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from trm_diffusion.errors import cannot_write
from trm_diffusion.machine import machine, started

PathLike = str | os.PathLike
QUIET_SECONDS = 60  # a partial file of another machine that is not written for so long was left by a killed job


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[epath.Path]:
    """Yields a hidden path to write a file or a directory to, and renames it to `path` at the end of the block.

    Creates the parent directory if needed. After an error the hidden path is gone and `path` is unchanged. A
    directory must be new: a rename does not replace one. Raises UserError if it cannot be written.
    """
    path = epath.Path(path)
    partial = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that led here says more
                remove(partial)
            raise


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Turns an OSError of the block, which writes `path`, into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def check_writable(path: PathLike) -> None:
    """Raises UserError if `path` could not be written now, and leaves nothing. Jobs call this before hours of work."""
    path = epath.Path(path)
    if "://" in str(path):
        folder = path.parent
    else:
        folder = next(parent for parent in epath.Path(os.path.abspath(path)).parents if parent.exists())
    probe = partial_path(folder / path.name)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            probe.write_bytes(bytes(4096))  # an empty file fits on a full disk
        finally:
            with contextlib.suppress(OSError):
                remove(probe)


def partial_path(path: PathLike) -> epath.Path:
    """The hidden path that this process writes to before it is renamed to `path`."""
    path = epath.Path(path)
    return path.with_name(f".{path.name}.partial-{machine()}-{os.getpid()}")


def remove(path: epath.Path) -> None:
    """Removes a file or a directory if it exists."""
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def clear_partial(directory: PathLike, name: str = "*", *, below: bool = True) -> None:
    """Removes the partial files that killed jobs left for `name` (a glob), in a local directory and below it.

    Spares what another process is writing. Call this only before this process writes such a file.
    """
    directory, pattern = pathlib.Path(directory), f".{name}.partial-*"
    for partial in list(directory.rglob(pattern) if below else directory.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # it was complete in this moment
            if _left_behind(partial):
                remove(epath.Path(partial))


def _left_behind(partial: pathlib.Path) -> bool:
    """Whether no process is writing this partial file any more."""
    writer, _, pid = partial.name.rpartition(".partial-")[2].rpartition("-")
    if writer == machine() and pid.isdigit():
        return int(pid) == os.getpid() or started(int(pid)) is None
    newest = max(path.stat().st_mtime for path in (partial, *partial.rglob("*")))
    return time.time() - newest > QUIET_SECONDS


def write_bytes(path: PathLike, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Writes `text` as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, record: Any, indent: int = 2) -> None:
    write_text(path, json.dumps(record, indent=indent) + "\n")


def sha256(chunks: Iterable[bytes | np.ndarray]) -> str:
    """The hash of all chunks, one after another. Arrays must be contiguous."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of_file(path: PathLike) -> str:
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    return sha256([text.encode()])


def sha256_of_json(record: Any) -> str:
    return sha256_of_text(json.dumps(record))


def sha256_of_names(names: Iterable[str]) -> str:
    """The hash of names in order. Data whose records have the same names count as the same data."""
    return sha256(name.encode() + b"\n" for name in names)


def sha256_of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """The hash of arrays in order. The heading of each, such as name, dtype and shape, is hashed before its bytes."""

    def chunks() -> Iterator[bytes | np.ndarray]:
        for heading, array in arrays:
            yield heading.encode()
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    return sha256(chunks())
