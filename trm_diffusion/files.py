"""Files that appear whole or not at all, and the checksums of what they hold.

A file is written under a hidden name beside its own, `.NAME.partial-PROCESS`, and renamed when it is complete. So a
reader never sees half a file, and what a killed job leaves behind can be recognised by its name.
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
    """A hidden path to write a file or a directory at, which becomes `path` at the end of the block.

    Makes the directory around `path` if need be. After an error nothing of the hidden path is left, and `path` is as it
    was before. A directory can only be new: renaming does not replace one.
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
    """Where this process writes what `path` becomes."""
    path = epath.Path(path)
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def remove(path: epath.Path) -> None:
    """Removes a file or a directory, if there is one."""
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def clear_partial(directory: PathLike, name: str = "*") -> None:
    """Removes what killed jobs left of files of this name (a glob), in a local directory and the folders below it.

    Only for a caller that knows that no other process is writing such a file.
    """
    for partial in list(pathlib.Path(directory).rglob(f".{name}.partial-*")):
        remove(epath.Path(partial))


def write_bytes(path: PathLike, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, record: Any, indent: int = 2) -> None:
    write_text(path, json.dumps(record, indent=indent) + "\n")


def sha256(chunks: Iterable[bytes | np.ndarray]) -> str:
    """Of all chunks, one after another; arrays are contiguous."""
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
    """Of names in order: data whose records have the same names are the same data."""
    return sha256(name.encode() + b"\n" for name in names)


def sha256_of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Of the bytes of arrays in order, each after its heading: what is to be told apart besides its bytes."""

    def chunks() -> Iterator[bytes | np.ndarray]:
        for heading, array in arrays:
            yield heading.encode()
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    return sha256(chunks())
