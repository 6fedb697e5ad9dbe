"""Lists folders: what every reader of a folder or a tar passes over, and what it refuses.

Hidden files and folders, and those that operating systems leave (`._x`, `__MACOSX`, Thumbs.db, ...), are passed over.
A file that a reader asked for must be a regular file or a link to one.
"""

import os
import stat
from collections.abc import Iterator, Sequence

from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.readers.opening import KINDS
from trm_diffusion.readers.paths import PathLike, is_bucket

JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found"}  # lower case


def is_junk(name: str) -> bool:
    """Whether every reader passes over a file or folder with this name, without its folders."""
    return name.startswith(".") or name.lower() in JUNK


def list_files(folder: PathLike, suffixes: Sequence[str] = ("",)) -> list[str]:
    """Sorted names of the files in a folder that end in one of the suffixes, in either case.

    Raises UserError for one that is a FIFO, device, socket, broken link, or whose name is not UTF-8.
    """
    return sorted(name for name, is_folder in _entries(folder, suffixes) if not is_folder)


def list_folders(folder: PathLike) -> list[str]:
    """Sorted names of the folders, and links to folders, in a folder."""
    return sorted(name for name, is_folder in _entries(folder, ()) if is_folder)


def list_below(folder: PathLike, suffixes: Sequence[str] = ("",)) -> list[str]:
    """As `list_files`, of a folder and all folders in it: paths relative to it, with slashes, sorted by their parts."""
    found = _below(os.fspath(folder), "", suffixes, ())
    return sorted(found, key=lambda path: path.split("/"))


def _below(root: str, inside: str, suffixes: Sequence[str], above: tuple) -> Iterator[str]:
    folder = os.path.join(root, inside) if inside else root
    if not is_bucket(root):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in above:
            raise UserError(f"{folder} is a link to a folder above it: remove it")
        above = (*above, (info.st_dev, info.st_ino))
    for name, is_folder in _entries(folder, suffixes):
        if is_folder:
            yield from _below(root, f"{inside}{name}/", suffixes, above)
        else:
            yield inside + name


def _entries(folder: PathLike, suffixes: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Name, and whether it is a folder, of each folder and each file with one of the suffixes; not of junk."""
    suffixes = tuple(suffixes)
    try:
        if is_bucket(folder):
            for path in epath.Path(folder).iterdir():
                is_folder = path.is_dir()
                if not is_junk(path.name) and (is_folder or path.name.lower().endswith(suffixes)):
                    yield path.name, is_folder
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                is_folder = entry.is_dir()
                if is_folder or entry.name.lower().endswith(suffixes):
                    _check_entry(entry, is_folder)
                    yield entry.name, is_folder
    except OSError as error:
        raise UserError(f"{os.fspath(folder)} cannot be listed ({error.strerror or error})") from error


def _check_entry(entry: os.DirEntry, is_folder: bool) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{entry.path!r}: the name is not UTF-8; rename it") from None
    if not is_folder and not entry.is_file():
        kind = "a broken link"
        if os.path.exists(entry.path):
            kind = KINDS.get(stat.S_IFMT(entry.stat().st_mode), "something else")
        raise UserError(f"{entry.path} is {kind}, not a file: remove it")
