"""Prepared latents: what a VAE's encoder says of each image, computed once and read many times.

A directory holds array_record shards, beside each a small JSON file about it, and `manifest.json`, which is made of
those files. One record is a label (int32), the posterior mean and the posterior standard deviation (both float16
[H, W, C]), little-endian. The file about a shard is written after it, and the manifest last: a shard that has one is
whole, and so is a directory that has a manifest. Reading draws

    z = (mean + std * eps - shift) * scale,    eps ~ N(0, 1),

anew in each epoch, so that the model never sees only one sample of a posterior.
"""

import collections
import dataclasses
import json
import os
import pathlib
import threading

import numpy as np

from trm_diffusion.data.base import Element, Source, make_element
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.weights.source import sha256

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARD_FIELDS = {
    "file", "records", "sha256", "class_counts", "bad_images", "num_classes", "latent", "preparation"
}  # fmt: skip

_HOW_TO_PREPARE = (
    "make latents by --mode=prepare and set config.data.path to their directory, "
    "or run without data by --config.data.source=synthetic"
)


class ShardWriter:
    """Writes one shard; a context manager. After an error nothing of it is left.

    Args:
      directory: where to; it exists.
      index: of the shard.
      spec: what the records are.
      num_classes: labels are 0 .. num_classes - 1.
      preparation: how the records were made, the same for all shards; JSON.
    """

    def __init__(
        self, directory: pathlib.Path, index: int, spec: LatentSpec, num_classes: int, preparation: dict | None = None
    ):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._directory, self._index = directory, index
        self._spec, self._num_classes = spec, num_classes
        self._preparation = preparation
        self._class_counts, self.bad_images = collections.Counter(), []
        self._partial = directory / f".{shard_name(index)}.partial"
        # Groups of one record: a random read then touches nothing but its own bytes.
        self._file = ArrayRecordWriter(str(self._partial), "group_size:1")

    @property
    def records(self) -> int:
        return self._class_counts.total()

    def write(self, mean: np.ndarray, std: np.ndarray, label: int) -> None:
        """Appends one record: posterior mean and standard deviation [size, size, channels], unscaled.

        Raises:
          UserError: another shape than the spec's, a label out of range, or values that float16 cannot hold.
        """
        self._file.write(self._encode(mean, std, label))
        self._class_counts[int(label)] += 1

    def note_bad_image(self, name: str, reason: str) -> None:
        """Notes an image that has no record because it cannot be read."""
        self.bad_images.append({"name": name, "reason": reason})

    def _encode(self, mean: np.ndarray, std: np.ndarray, label: int) -> bytes:
        where = f"{shard_name(self._index)}, record {self.records}"
        shape = (self._spec.size, self._spec.size, self._spec.channels)
        if not 0 <= label < self._num_classes:
            raise UserError(f"{where}: label {label} is not one of the {self._num_classes} classes")
        parts = [np.array(label, "<i4").tobytes()]
        for name, values in (("mean", mean), ("std", std)):
            if np.shape(values) != shape:
                raise UserError(f"{where}: {name} has shape {np.shape(values)}, the spec says {shape}")
            with np.errstate(over="ignore"):
                half = np.asarray(values).astype("<f2")
            if not np.isfinite(half).all():
                raise UserError(f"{where}: {name} holds values that are not finite in float16")
            parts.append(half.tobytes())
        return b"".join(parts)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self._file.close()
        if error_type is not None:
            self._partial.unlink(missing_ok=True)
            return
        file = self._directory / shard_name(self._index)
        os.replace(self._partial, file)
        record = {
            "file": file.name,
            "records": self.records,
            "sha256": sha256(file),
            "class_counts": {str(label): count for label, count in sorted(self._class_counts.items())},
            "bad_images": self.bad_images,
            "num_classes": self._num_classes,
            "latent": dataclasses.asdict(self._spec),
            "preparation": self._preparation,
        }
        _write_json(file.with_suffix(".json"), record)


def shard_name(index: int) -> str:
    return f"latents-{index:05d}.array_record"


def read_shard_record(directory: pathlib.Path, index: int) -> dict | None:
    """What `ShardWriter` says of a shard, or None where that shard or the file about it is not whole."""
    path = directory / shard_name(index)
    try:
        record = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return record if record.keys() >= SHARD_FIELDS and path.is_file() else None


def assemble_manifest(shards: list[dict]) -> dict:
    """The manifest of a directory, from the records of all its shards in order."""
    counts = collections.Counter()
    for shard in shards:
        counts.update(shard["class_counts"])
    first = shards[0]
    return {
        "format_version": FORMAT_VERSION,
        "records": counts.total(),
        "num_classes": first["num_classes"],
        "latent": first["latent"],
        "preparation": first["preparation"],
        "bad_images": [image for shard in shards for image in shard["bad_images"]],
        "class_counts": [counts[str(label)] for label in range(first["num_classes"])],
        "shards": [{name: shard[name] for name in ("file", "records", "sha256")} for shard in shards],
    }


def write_manifest(directory: pathlib.Path, shards: list[dict], written_by: dict | None = None) -> dict:
    """Writes and returns the manifest of a directory whose shards are all there."""
    manifest = assemble_manifest(shards) | {"written_by": written_by}
    _write_json(directory / MANIFEST_NAME, manifest)
    return manifest


def _write_json(path: pathlib.Path, record: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


class LatentWriter:
    """Writes a directory of latents from whatever encoded them, shard after shard; a context manager.

    A run that dies in between leaves a directory without a manifest, which readers refuse, and running it again gives
    the same bytes.

    Args:
      directory: created if it does not exist. UserError if it holds a manifest already.
      spec: what the records are.
      num_classes: labels are 0 .. num_classes - 1.
      records_per_shard: a new shard file begins after so many records.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        spec: LatentSpec,
        *,
        num_classes: int,
        records_per_shard: int = 10_000,
    ):
        if records_per_shard < 1:
            raise ValueError(f"records_per_shard={records_per_shard} must be at least 1")
        self._directory = pathlib.Path(directory)
        self._spec = spec
        self._num_classes = num_classes
        self._records_per_shard = records_per_shard
        self._shards: list[dict] = []  # records of the closed ones
        self._shard: ShardWriter | None = None
        if (self._directory / MANIFEST_NAME).exists():
            raise UserError(f"{self._directory} holds prepared latents already: choose another directory or remove it")
        self._directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None and self._shard is not None:
            self._shard.__exit__(error_type, error, traceback)
        if error_type is None:
            self._close_shard()
            if not self._shards:
                raise UserError(f"no records were written to {self._directory}")
            write_manifest(self._directory, self._shards)

    def write(self, mean: np.ndarray, std: np.ndarray, label: int) -> None:
        """Appends one record; see `ShardWriter.write`."""
        if self._shard is None:
            self._shard = ShardWriter(self._directory, len(self._shards), self._spec, self._num_classes)
        self._shard.write(mean, std, label)
        if self._shard.records == self._records_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.__exit__(None, None, None)
            self._shards.append(read_shard_record(self._directory, len(self._shards)))
            self._shard = None


class LatentSource(Source):
    """Reads what `LatentWriter` wrote: `source[i]` is the scaled mean, `sample` draws from the posterior.

    Attributes:
      spec: the LatentSpec of the directory, for the checkpoint and the decoder.

    Raises:
      UserError: an empty or missing path, no manifest, another format version, a missing or damaged shard.
    """

    stochastic = True

    def __init__(self, directory: str):
        self._directory = pathlib.Path(directory)
        manifest = read_manifest(directory)
        self.spec: LatentSpec = manifest["latent"]
        self.num_classes: int = manifest["num_classes"]
        self.sample_shape = (self.spec.size, self.spec.size, self.spec.channels)
        self._files = [shard["file"] for shard in manifest["shards"]]
        self._counts = [shard["records"] for shard in manifest["shards"]]
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._length = sum(self._counts)
        for name in self._files:
            if not (self._directory / name).is_file():
                raise UserError(f"{self._directory / name} is missing: prepare the latents again")
        self._forget_readers()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Element:
        mean, _, label = self._moments(index)
        return make_element(self.spec.normalize(mean), label, index)

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        mean, std, label = self._moments(index)
        latent = mean + std * rng.standard_normal(mean.shape, np.float32)
        return make_element(self.spec.normalize(latent), label, index)

    def __getstate__(self) -> dict:
        # File readers do not travel; a worker process opens its own when it first needs them.
        return self.__dict__ | {"_readers": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._readers: list = [None] * len(self._files)
        self._lock = threading.Lock()

    def _moments(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Mean and standard deviation, both float32 [H, W, C] and unscaled, and the label of one record."""
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        position = int(index - self._ends[shard] + self._counts[shard])
        path = self._directory / self._files[shard]
        try:
            record = self._reader(shard).read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is damaged at record {position}: prepare the latents again") from error
        try:
            return decode_record(record, self.spec)
        except ValueError as error:
            raise UserError(f"{path}: record {position} {error}: prepare the latents again") from None

    def _reader(self, shard: int):
        with self._lock:
            if self._readers[shard] is None:
                from array_record.python.array_record_module import ArrayRecordReader

                path = str(self._directory / self._files[shard])
                # Reading ahead only costs time when the next record is somewhere else.
                reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
                if reader.num_records() != self._counts[shard]:
                    raise UserError(
                        f"{path} holds {reader.num_records()} records, the manifest says "
                        f"{self._counts[shard]}: prepare the latents again"
                    )
                self._readers[shard] = reader
            return self._readers[shard]


def decode_record(record: bytes, spec: LatentSpec) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and deviation, float32 [size, size, channels], unscaled, and label. ValueError for another length."""
    shape = (spec.size, spec.size, spec.channels)
    length = 4 + 2 * 2 * int(np.prod(shape))
    if len(record) != length:
        raise ValueError(f"is {len(record)} bytes long, the manifest asks for {length}")
    label = int(np.frombuffer(record, "<i4", count=1)[0])
    mean, std = np.frombuffer(record, "<f2", offset=4).reshape(2, *shape).astype(np.float32)
    return mean, std, label


def read_manifest(directory: str) -> dict:
    """The checked manifest, with "latent" as a LatentSpec."""
    if not directory:
        raise UserError(f"config.data.source=latents needs config.data.path: {_HOW_TO_PREPARE}")
    path = pathlib.Path(directory) / MANIFEST_NAME
    if not path.parent.is_dir():
        raise UserError(f"config.data.path={directory!r} does not exist: {_HOW_TO_PREPARE}")
    if not path.is_file():
        raise UserError(f"config.data.path={directory!r} has no {MANIFEST_NAME}: {_HOW_TO_PREPARE}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}: prepare the latents again"
            )
        manifest["latent"] = LatentSpec(**manifest["latent"])
        records = sum(shard["records"] for shard in manifest["shards"] if shard["file"])
        consistent = (
            records == manifest["records"] == sum(manifest["class_counts"])
            and len(manifest["class_counts"]) == manifest["num_classes"] >= 1
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): prepare the latents again") from error
    if not consistent:
        raise UserError(f"{path} counts {manifest['records']} records, its shards {records}: prepare the latents again")
    return manifest
