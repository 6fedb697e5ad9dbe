"""Shards of records, computed once and read many times: array_record files, each with a small JSON record next to it.

The JSON file is written last, so a shard that has one is complete. What the records of a directory mean is in its
manifest; see `latents.py` and `encodings.py`.
"""

import abc
import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import clear_partial, partial_path, remove, sha256_of_file, write_json
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import read_json

MANIFEST_NAME = "manifest.json"
LISTED_FIELDS = ("file", "records", "sha256")  # fields of a shard's JSON record that the manifest repeats
SHARD_FORM = {"file": str, "records": int, "sha256?": str}  # of a shard, in its own record and in the manifest
INDENT = 1  # spaces, in the JSON files of a directory of shards


class ShardFile(abc.ABC):
    """Writes one shard; a context manager. After an error nothing of the shard is left.

    Only one process may write a shard at a time. Raises UserError if it cannot be written.
    """

    def __init__(self, path: pathlib.Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = path
        self.records = 0
        clear_partial(path.parent, path.name)
        self._partial = partial_path(path)
        # Groups of one record, so that a random read touches only its own bytes.
        with self._writing():
            self._file = ArrayRecordWriter(str(self._partial), "group_size:1")

    def append(self, record: bytes) -> None:
        with self._writing():
            self._file.write(record)
        self.records += 1

    @abc.abstractmethod
    def about(self) -> dict:
        """The JSON record, except the shard's file name, number of records and checksum."""

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            with self._writing():
                self._file.close()
        except UserError:
            remove(self._partial)
            raise
        if error_type is not None:
            remove(self._partial)
            return
        self._partial.replace(self.path)
        record = {"file": self.path.name, "records": self.records, "sha256": sha256_of_file(self.path)}
        write_json(self.path.with_suffix(".json"), record | self.about(), INDENT)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the library's error for any failure to write
            reason = str(error).partition(";")[0]
            raise UserError(
                f"{self.path} cannot be written ({reason}): free some space, or choose another --out; then start the "
                "same command again"
            ) from error


def read_about(path: pathlib.Path, form: dict) -> dict | None:
    """The JSON record of the shard `path`; None if it is of another form or damaged, or if either file is missing."""
    try:
        about = read_json(path.with_suffix(".json"), form)
    except UserError:
        return None
    return about if path.is_file() else None


def holds_all_records(directory: pathlib.Path, record: dict) -> bool:
    """Whether a shard still holds as many records as were written. A truncated one has lost its list of records."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(directory / record["file"])).num_records() == record["records"]


def write_manifest(directory: pathlib.Path, manifest: dict, written_by: dict | None = None) -> dict:
    """Writes the manifest of a directory whose shards are complete, and returns it."""
    manifest = manifest | {"written_by": written_by}
    write_json(directory / MANIFEST_NAME, manifest, INDENT)
    return manifest


class ShardReader:
    """Reads the bytes of record `index`, counted over all shards of a directory. Picklable and thread-safe.

    Args:
      shards: {"file", "records"} of each shard, in order.
      remedy: how the user can make the shards again, for errors.

    Raises:
      UserError: a shard is missing, is damaged, or has another number of records.
    """

    def __init__(self, directory: str | os.PathLike, shards: list[dict], remedy: str):
        self._paths = [local_path(directory) / shard["file"] for shard in shards]
        self._counts = [shard["records"] for shard in shards]
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._remedy = remedy
        for path, count in zip(self._paths, self._counts, strict=True):
            if count < 0:
                raise UserError(f"{path} cannot hold {count} records: {remedy}")
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
        """The file of record `index` and its position there, for errors."""
        shard, position = self._place(index)
        return f"{self._paths[shard]}: record {position}"

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self._counts[shard])

    def __getstate__(self) -> dict:
        # File readers are not pickled; a worker process opens its own on first use.
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
                # Reads are random, so reading ahead would only cost time.
                reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
                if reader.num_records() != self._counts[shard]:
                    raise UserError(
                        f"{path} holds {reader.num_records()} records, the manifest says "
                        f"{self._counts[shard]}: {self._remedy}"
                    )
                self._readers[shard] = reader
            return self._readers[shard]
