"""Opens files to read. FIFOs, devices and sockets, also behind links, are refused: reading them may never end."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.readers.paths import PathLike, is_bucket

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: PathLike) -> BinaryIO:
    """Opens a regular file. Raises OSError for anything else, before it is opened."""
    if not is_bucket(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
    return epath.Path(path).open("rb")


@contextlib.contextmanager
def open_file(path: PathLike) -> Iterator[BinaryIO]:
    """Opens a regular file; it closes at the end of the block. Raises UserError, also for errors while it is read."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read ({error.strerror or error})") from error


def read_bytes(path: PathLike) -> bytes:
    with open_file(path) as file:
        return file.read()


def size_of(file: BinaryIO) -> int:
    """Bytes in an open file; the position stays."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size
