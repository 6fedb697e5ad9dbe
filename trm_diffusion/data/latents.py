"""Prepared latents: what a VAE's encoder says of each image, computed once and read many times.

A directory holds `manifest.json` and array_record shards. One record is a label (int32), the posterior mean
and the posterior standard deviation (both float16 [H, W, C]), little-endian. The manifest is written last, so
a directory that has one is complete. Reading draws

    z = (mean + std * eps - shift) * scale,    eps ~ N(0, 1),

anew in each epoch, so that the model never sees only one sample of a posterior.
"""

import dataclasses
import json
import os
import pathlib
import threading

import numpy as np

from trm_diffusion.data.base import Element, Source, make_element
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

_HOW_TO_PREPARE = (
    "write latents with trm_diffusion.data.latents.LatentWriter and set config.data.path to their directory, "
    "or run without data by --config.data.source=synthetic"
)


class LatentWriter:
    """Writes prepared latents; a context manager.

    Every file appears under its name only when it is complete, and the manifest last: a run that dies in
    between leaves a directory that readers refuse, and running it again gives the same bytes.

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
        self._shards: list[dict] = []  # closed ones: {"file": name, "records": count}
        self._shard = None
        self._records_in_shard = 0
        if (self._directory / MANIFEST_NAME).exists():
            raise UserError(f"{self._directory} holds prepared latents already: choose another directory or remove it")
        self._directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._close_shard()
            self._write_manifest()
        elif self._shard is not None:
            self._shard.close()
            self._temporary_shard().unlink(missing_ok=True)

    def write(self, mean: np.ndarray, std: np.ndarray, label: int) -> None:
        """Appends one record: posterior mean and standard deviation [size, size, channels], unscaled.

        Raises:
          UserError: another shape than the spec's, a label out of range, or values that float16 cannot hold.
        """
        record = self._encode(mean, std, label)
        if self._shard is None:
            from array_record.python.array_record_module import ArrayRecordWriter

            # Groups of one record: a random read then touches nothing but its own bytes.
            self._shard = ArrayRecordWriter(str(self._temporary_shard()), "group_size:1")
        self._shard.write(record)
        self._records_in_shard += 1
        if self._records_in_shard == self._records_per_shard:
            self._close_shard()

    def _encode(self, mean: np.ndarray, std: np.ndarray, label: int) -> bytes:
        where = f"record {sum(shard['records'] for shard in self._shards) + self._records_in_shard}"
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

    def _shard_name(self) -> str:
        return f"latents-{len(self._shards):05d}.array_record"

    def _temporary_shard(self) -> pathlib.Path:
        return self._directory / f".{self._shard_name()}.partial"

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.close()
        os.replace(self._temporary_shard(), self._directory / self._shard_name())
        self._shards.append({"file": self._shard_name(), "records": self._records_in_shard})
        self._shard, self._records_in_shard = None, 0

    def _write_manifest(self) -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "records": sum(shard["records"] for shard in self._shards),
            "num_classes": self._num_classes,
            "latent": dataclasses.asdict(self._spec),
            "shards": self._shards,
        }
        temporary = self._directory / f".{MANIFEST_NAME}.partial"
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(temporary, self._directory / MANIFEST_NAME)


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
        manifest = _read_manifest(directory)
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
        mean, _, label = self._read(index)
        return make_element(self.spec.normalize(mean), label, index)

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        mean, std, label = self._read(index)
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

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns mean and std, both float32 [H, W, C], and the label of one record."""
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        position = int(index - self._ends[shard] + self._counts[shard])
        path = self._directory / self._files[shard]
        try:
            record = self._reader(shard).read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is damaged at record {position}: prepare the latents again") from error
        cells = int(np.prod(self.sample_shape))
        if len(record) != 4 + 2 * 2 * cells:
            raise UserError(
                f"{path}: record {position} is {len(record)} bytes long, the manifest asks for "
                f"{4 + 2 * 2 * cells}: prepare the latents again"
            )
        label = int(np.frombuffer(record, "<i4", count=1)[0])
        mean, std = np.frombuffer(record, "<f2", offset=4).reshape(2, *self.sample_shape).astype(np.float32)
        return mean, std, label

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


def _read_manifest(directory: str) -> dict:
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
        consistent = records == manifest["records"] and manifest["num_classes"] >= 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): prepare the latents again") from error
    if not consistent:
        raise UserError(f"{path} counts {manifest['records']} records, its shards {records}: prepare the latents again")
    return manifest
