"""Records on disk, computed once and read many times: array_record files, each with a small JSON file about it.

A shard is written to a hidden file and named when it is whole, and the file about it comes last: a shard that has one
is whole. What a directory of them means is said by its manifest, in `latents.py` and `encodings.py`.
"""

import json
import os
import pathlib
import threading

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file

MANIFEST_NAME = "manifest.json"


class ShardFile:
    """One shard while it is written: `append` records, then `finish` or `discard`."""

    def __init__(self, path: pathlib.Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.records = path, 0
        self._partial = path.with_name(f".{path.name}.partial")
        # Groups of one record: a random read then touches nothing but its own bytes.
        self._file = ArrayRecordWriter(str(self._partial), "group_size:1")

    def append(self, record: bytes) -> None:
        self._file.write(record)
        self.records += 1

    def finish(self, about: dict) -> None:
        """Names the shard, and writes the file about it: its name, count and checksum, and `about`."""
        self._file.close()
        os.replace(self._partial, self.path)
        record = {"file": self.path.name, "records": self.records, "sha256": sha256_of_file(self.path)}
        write_json(self.path.with_suffix(".json"), record | about)

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def read_about(path: pathlib.Path, fields: set[str]) -> dict | None:
    """The file about the shard `path`, or None where it lacks a field, or it or the shard is not whole."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return about if about.keys() >= fields and path.is_file() else None


def refuse_change(directory: pathlib.Path, what: str, before: dict, now: dict) -> None:
    """Raises UserError for the first field in which a directory was made otherwise than `now`."""
    changed = [field for field in now if before.get(field) != now[field]]
    if changed:
        field = changed[0]
        raise UserError(
            f"{directory} holds {what} made with {field} = {before.get(field)!r}, not {now[field]!r}: "
            "remove it, or give another --out"
        )


def write_json(path: pathlib.Path, record: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


class ShardReader:
    """Bytes of record `index`, counted over all shards of a directory. Picklable, and safe from several threads.

    Args:
      shards: {"file", "records"} of each, in order.
      remedy: how the user makes them again, for errors.

    Raises:
      UserError: a shard that is missing, damaged, or of another length.
    """

    def __init__(self, directory: str | os.PathLike, shards: list[dict], remedy: str):
        self._paths = [pathlib.Path(directory) / shard["file"] for shard in shards]
        self._counts = [shard["records"] for shard in shards]
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._remedy = remedy
        for path in self._paths:
            if not path.is_file():
                raise UserError(f"{path} is missing: {remedy}")
        self._forget_readers()

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> bytes:
        shard, position = self._place(index)
        try:
            return self._reader(shard).read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{self._paths[shard]} is damaged at record {position}: {self._remedy}") from error

    def where(self, index: int) -> str:
        """The file of record `index` and its place there, for errors."""
        shard, position = self._place(index)
        return f"{self._paths[shard]}: record {position}"

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self._counts[shard])

    def __getstate__(self) -> dict:
        # File readers do not travel; a worker process opens its own when it first needs them.
        return self.__dict__ | {"_readers": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._readers: list = [None] * len(self._paths)
        self._lock = threading.Lock()

    def _reader(self, shard: int):
        with self._lock:
            if self._readers[shard] is None:
                from array_record.python.array_record_module import ArrayRecordReader

                path = str(self._paths[shard])
                # Reading ahead only costs time when the next record is somewhere else.
                reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
                if reader.num_records() != self._counts[shard]:
                    raise UserError(
                        f"{path} holds {reader.num_records()} records, the manifest says "
                        f"{self._counts[shard]}: {self._remedy}"
                    )
                self._readers[shard] = reader
            return self._readers[shard]
