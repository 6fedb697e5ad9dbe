"""Arrays in NumPy's files, .npy and .npz. A header is checked against the file's size before anything is allocated."""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.readers.opening import open_file, size_of
from trm_diffusion.readers.paths import PathLike

KINDS = {"f": "floats", "i": "whole numbers", "u": "whole numbers", "b": "booleans"}  # dtypes that are read
DEFLATE_RATIO = 1032  # no deflated data are larger than this many times their bytes


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    order: str  # C or F (columns first)


def read_npy(path: PathLike, shape: tuple[int | None, ...], kinds: str = "fiu") -> np.ndarray:
    """The array of a .npy file. Raises UserError, before reading it, for another shape or kind of dtype.

    shape: None stands for any size. kinds: letters of KINDS.
    """
    with naming_damage(path, "a .npy file"), open_file(path) as file:
        header = _read_header(file, size_of(file))
        _check(f"{os.fspath(path)}", header, shape, kinds)
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


class NpzFile:
    """The arrays of an .npz file: `headers` by name, and the values on demand.

    Raises UserError for a file that is not one, and for an array that claims more bytes than the file can hold.
    """

    def __init__(self, path: PathLike):
        self.path = path
        self.headers: dict[str, Header] = {}
        with naming_damage(path, "an .npz file"), open_file(path) as file, zipfile.ZipFile(file) as archive:
            size = size_of(file)
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{info.filename} is compressed in another way than deflate")
                if info.compress_size > size or info.file_size > most:
                    raise ValueError(f"{info.filename} claims {info.file_size:,} bytes, the file has {size:,}")
                with archive.open(info) as stream:
                    self.headers[info.filename.removesuffix(".npy")] = _read_header(stream, info.file_size)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[BinaryIO]:
        """A file at the first value of an array; it can seek. Errors in the block name the npz file."""
        with naming_damage(self.path, "an .npz file"), open_file(self.path) as file, zipfile.ZipFile(file) as archive:
            with archive.open(f"{name}.npy") as stream:
                _read_header(stream, archive.getinfo(f"{name}.npy").file_size)
                yield stream

    def read(self, name: str, shape: tuple[int | None, ...], kinds: str = "fiu") -> np.ndarray:
        """The array. Raises UserError, before reading it, for another shape or kind of dtype; see `read_npy`."""
        if name not in self.headers:
            raise UserError(f"{os.fspath(self.path)} has no array {name}")
        header = self.headers[name]
        _check(f"{os.fspath(self.path)}: {name}", header, shape, kinds)
        with self.stream(name) as stream:
            data = stream.read(math.prod(header.shape) * header.dtype.itemsize)
            stream.read()  # to the end, where the checksum is verified
            return np.frombuffer(data, header.dtype).reshape(header.shape, order=header.order)


@contextlib.contextmanager
def naming_damage(path: PathLike, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  zipfile, zlib and NumPy report damage through nearly every type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{os.fspath(path)} is damaged, or is not {what} ({reason}): write it again") from error


def _read_header(stream: BinaryIO, size: int) -> Header:
    """Reads the header at the start of a .npy file of `size` bytes. Raises ValueError if the two do not match."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects, which are not read")
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if min(shape, default=0) < 0 or claimed != held:
        raise ValueError(f"{dtype} {list(shape)} takes {claimed:,} bytes, there are {held:,}")
    return Header(shape, dtype, "F" if fortran_order else "C")


def _check(where: str, header: Header, shape: tuple[int | None, ...], kinds: str) -> None:
    fits = len(header.shape) == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, header.shape, strict=True)
    )
    if not fits or header.dtype.kind not in kinds:
        wish = ", ".join("N" if length is None else str(length) for length in shape)
        names = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
        raise UserError(f"{where} is {header.dtype} {list(header.shape)}; it must be {names} [{wish}]")
