"""Members of uncompressed tars, by their place in the file. Nothing is ever extracted.

Python's tarfile takes a damaged header, or the end of the file, for the end of the tar, and skips what follows the end
of the first of two joined tars. Here each is an error, so that no member is lost without a word.
"""

import os
import tarfile
from collections.abc import Sequence
from typing import BinaryIO

from trm_diffusion.errors import UserError
from trm_diffusion.readers.folders import is_junk
from trm_diffusion.readers.opening import open_file, size_of
from trm_diffusion.readers.paths import PathLike

BLOCK = tarfile.BLOCKSIZE
CHUNK = 2**20


def list_members(path: PathLike, suffixes: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar whose name ends in one of the suffixes, in either case, in order.

    Hidden members and junk (readers/folders.py) are passed over.

    Raises UserError for a tar that is damaged or has no end, and for a link, sparse file, device or FIFO among them.
    """
    members, suffixes = [], tuple(suffixes)
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = size_of(file)
            for member in tar:
                tar.members = []  # a million of them would fill the memory
                _check_place(member, tar.offset, size)
                if not member.isdir() and not _is_junk(member.name) and member.name.lower().endswith(suffixes):
                    _check_kind(member)
                    members.append((member.name, member.offset_data, member.size))
            _check_end(file, tar.offset)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  tarfile reports damage through several types
        name = os.fspath(path)
        raise UserError(f"{name} is damaged, or is not an uncompressed tar ({error}): fetch it again") from error
    return members


def _check_place(member: tarfile.TarInfo, end: int, size: int) -> None:
    if member.size < 0 or end <= member.offset:
        raise ValueError(f"{member.name} has {member.size} bytes")
    if end > size:
        raise ValueError(f"{member.name} ends at byte {end}, the file at {size}")


def _check_kind(member: tarfile.TarInfo) -> None:
    if member.issparse() or not member.isreg():
        kind = "a sparse file" if member.issparse() else "a link, device or FIFO"
        raise ValueError(f"{member.name} is {kind}; pack the tar again with plain files")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {member.name!r} is not UTF-8") from None


def _is_junk(name: str) -> bool:
    return any(is_junk(part) for part in name.split("/") if part not in ("", ".", ".."))


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raises ValueError unless the tar ends at this offset: zeros, at least one block, and nothing after them."""
    file.seek(offset)
    found = 0
    while chunk := file.read(CHUNK):
        if chunk.count(0) != len(chunk):
            what = "a damaged header" if not found and any(chunk[:BLOCK]) else "more data after the end of the tar"
            raise ValueError(f"{what} at byte {offset + found}")
        found += len(chunk)
    if found < BLOCK:
        raise ValueError(f"it stops at byte {offset} without the end of a tar; it may be cut off")
