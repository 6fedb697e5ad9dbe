"""Atomic writes of files and directories, and checksums.

A file is written next to its final place under a hidden name, `.NAME.partial-PID`, and renamed when it is complete. So
a reader never sees half a file, and the leftovers of a killed job can be recognised by their names.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

PathLike = str | os.PathLike


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[epath.Path]:
    """Yields a hidden path to write a file or a directory to, and renames it to `path` at the end of the block.

    Creates the parent directory if needed. After an error the hidden path is gone and `path` is unchanged. A
    directory must be new: a rename does not replace one.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        remove(partial)
        raise


def partial_path(path: PathLike) -> epath.Path:
    """The hidden path that this process writes to before it is renamed to `path`."""
    path = epath.Path(path)
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def remove(path: epath.Path) -> None:
    """Removes a file or a directory if it exists."""
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def clear_partial(directory: PathLike, name: str = "*") -> None:
    """Removes the partial files that killed jobs left for `name` (a glob), in a local directory and below it.

    Call this only if no other process is writing such a file.
    """
    for partial in list(pathlib.Path(directory).rglob(f".{name}.partial-*")):
        remove(epath.Path(partial))


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
