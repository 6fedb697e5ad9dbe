"""Checksums of the files of a checkpoint: written once a save is complete, compared when it is restored.

`checksums.json` in a checkpoint's directory holds, for each of its other files, the size and the XXH3 hash of every
`CHUNK` bytes. XXH3 takes 17 GB in a second of CPU time, and CRC-32, the fastest of the standard library, 4. It finds
damage, not forgery.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import xxhash
from etils import epath

from trm_diffusion.files import write_json

NAME = "checksums.json"
CHUNK = 64 << 20  # bytes; the unit that threads and processes share
BLOCK = 1 << 20  # bytes read at a time
THREADS = min(16, os.cpu_count() or 1)  # xxhash releases the interpreter while it computes


def write_checksums(checkpoint: epath.Path) -> None:
    """Reads all files of a complete checkpoint and writes their checksums, in one thread beside the training."""
    sizes = {path: path.stat().length for path in _files(checkpoint) if path.name != NAME}
    record = {
        path.relative_to(checkpoint).as_posix(): {
            "bytes": size,
            "xxh3_64": [_xxh3_64(path, start, CHUNK) for start in range(0, size, CHUNK)],
        }
        for path, size in sizes.items()
    }
    write_json(checkpoint / NAME, {"chunk_bytes": CHUNK, "files": record}, indent=None)


def read_checksums(checkpoint: epath.Path) -> str:
    """The text of `checksums.json`; "" if the checkpoint has none."""
    try:
        return (checkpoint / NAME).read_bytes().decode(errors="replace") or "{}"
    except FileNotFoundError:
        return ""


def find_damage(
    checkpoint: epath.Path, checksums: str, share: tuple[int, int] = (0, 1), large: bool | None = None
) -> str:
    """What is wrong with the first file that differs from the text `checksums`; "" if none does.

    share: (index, count) of this process; each process compares every count-th chunk.
    large: compare only files of several chunks, or only the others.
    """
    try:
        record = json.loads(checksums)
        chunk, files = record["chunk_bytes"], record["files"]
        parts = [
            (name, entry["bytes"], start * chunk, digest)
            for name, entry in files.items()
            for start, digest in enumerate(entry["xxh3_64"] or [None])
            if large is None or large == (len(entry["xxh3_64"]) > 1)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} cannot be read"

    def compare(part: tuple) -> str:
        name, size, start, digest = part
        path = checkpoint / name
        try:
            found = path.stat().length
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            same = digest is None or _xxh3_64(path, start, chunk) == digest
            return "" if same else f"{name} differs from its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    with ThreadPoolExecutor(THREADS) as threads:
        return next(filter(None, threads.map(compare, parts[share[0] :: share[1]])), "")


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        yield from _files(path) if path.is_dir() else (path,)


def _xxh3_64(path: epath.Path, start: int, length: int) -> str:
    """The XXH3 hash, 64 bits, of `length` bytes from `start`, or of those up to the end of the file."""
    digest, block = xxhash.xxh3_64(), memoryview(bytearray(BLOCK))
    with path.open("rb") as file:
        file.seek(start)
        while length and (count := file.readinto(block[: min(BLOCK, length)])):
            digest.update(block[:count])
            length -= count
    return digest.hexdigest()
