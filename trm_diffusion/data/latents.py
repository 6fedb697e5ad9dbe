"""Prepared latents: what a VAE's encoder says of each image, computed once and read many times.

A directory holds shards (data/shards.py) and `manifest.json`, which is made of the files about them and written last: a
directory that has one is whole. One record is a label (int32; 0 for images with captions), the posterior mean and the
posterior standard deviation (both float16 [H, W, C]), little-endian. Reading draws

    z = (mean + std * eps - shift) * scale,    eps ~ N(0, 1),

anew in each epoch, so that the model never sees only one sample of a posterior.
"""

import collections
import dataclasses
import json
import os
import pathlib

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_element
from trm_diffusion.data.shards import MANIFEST_NAME, ShardFile, ShardReader, read_about, write_json
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec

FORMAT_VERSION = 1
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
      num_classes: labels are 0 .. num_classes - 1; 0 of images with captions, whose labels are 0.
      preparation: how the records were made, the same for all shards; JSON.
    """

    def __init__(
        self, directory: pathlib.Path, index: int, spec: LatentSpec, num_classes: int, preparation: dict | None = None
    ):
        self._index = index
        self._spec, self._num_classes = spec, num_classes
        self._preparation = preparation
        self._class_counts, self.bad_images = collections.Counter(), []
        self._file = ShardFile(directory / shard_name(index))

    @property
    def records(self) -> int:
        return self._file.records

    def write(self, mean: np.ndarray, std: np.ndarray, label: int) -> None:
        """Appends one record: posterior mean and standard deviation [size, size, channels], unscaled.

        Raises:
          UserError: another shape than the spec's, a label out of range, or values that float16 cannot hold.
        """
        self._file.append(self._encode(mean, std, label))
        if self._num_classes:
            self._class_counts[int(label)] += 1

    def note_bad_image(self, name: str, reason: str) -> None:
        """Notes an image that has no record because it cannot be read."""
        self.bad_images.append({"name": name, "reason": reason})

    def _encode(self, mean: np.ndarray, std: np.ndarray, label: int) -> bytes:
        where = f"{shard_name(self._index)}, record {self.records}"
        shape = (self._spec.size, self._spec.size, self._spec.channels)
        if not 0 <= label < max(1, self._num_classes):
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
        if error_type is not None:
            self._file.discard()
            return
        self._file.finish(
            {
                "class_counts": {str(label): count for label, count in sorted(self._class_counts.items())},
                "bad_images": self.bad_images,
                "num_classes": self._num_classes,
                "latent": dataclasses.asdict(self._spec),
                "preparation": self._preparation,
            }
        )


def shard_name(index: int) -> str:
    return f"latents-{index:05d}.array_record"


def read_shard_record(directory: pathlib.Path, index: int) -> dict | None:
    """What `ShardWriter` says of a shard, or None where that shard or the file about it is not whole."""
    return read_about(directory / shard_name(index), SHARD_FIELDS)


def assemble_manifest(shards: list[dict]) -> dict:
    """The manifest of a directory, from the records of all its shards in order."""
    counts = collections.Counter()
    for shard in shards:
        counts.update(shard["class_counts"])
    first = shards[0]
    return {
        "format_version": FORMAT_VERSION,
        "records": sum(shard["records"] for shard in shards),
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
    write_json(directory / MANIFEST_NAME, manifest)
    return manifest


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
      preparation: how --mode=prepare made it, None where something else wrote it.
      bad_images: names of the images that have no record.

    Raises:
      UserError: an empty or missing path, no manifest, another format version, a missing or damaged shard.
    """

    stochastic = True

    def __init__(self, directory: str):
        manifest = read_manifest(directory)
        self.spec: LatentSpec = manifest["latent"]
        self.num_classes: int = manifest["num_classes"]
        self.preparation: dict | None = manifest["preparation"]
        self.bad_images: list[str] = [image["name"] for image in manifest["bad_images"]]
        self.sample_shape = (self.spec.size, self.spec.size, self.spec.channels)
        self._records = ShardReader(directory, manifest["shards"], "prepare the latents again")

    @classmethod
    def from_config(cls, config: DataConfig) -> "LatentSource":
        if config.flip:
            raise UserError(
                "config.data.flip=true with config.data.source=latents: a flipped latent is not the latent "
                "of the flipped image; set flip=false, and flip=true when --mode=prepare makes the latents"
            )
        return cls(config.path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Element:
        mean, _, label = self._moments(index)
        return make_element(self.spec.normalize(mean), label, index)

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        mean, std, label = self._moments(index)
        latent = mean + std * rng.standard_normal(mean.shape, np.float32)
        return make_element(self.spec.normalize(latent), label, index)

    def _moments(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Mean and standard deviation, both float32 [H, W, C] and unscaled, and the label of one record."""
        try:
            return decode_record(self._records[index], self.spec)
        except ValueError as error:
            raise UserError(f"{self._records.where(index)} {error}: prepare the latents again") from None


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
            records == manifest["records"]
            and len(manifest["class_counts"]) == manifest["num_classes"]
            and (not manifest["num_classes"] or sum(manifest["class_counts"]) == records)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): prepare the latents again") from error
    if not consistent:
        raise UserError(f"{path} counts {manifest['records']} records, its shards {records}: prepare the latents again")
    return manifest
