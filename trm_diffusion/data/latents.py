"""Prepared latents: the posterior of a VAE's encoder for each image, computed once and read many times.

A directory holds shards (data/shards.py) and `manifest.json`, which is assembled from their JSON files and written
last, so a directory that has one is complete. One record is a label (int32; 0 for images with captions), the posterior
mean and the posterior standard deviation (both float16 [H, W, C]), little-endian. A read draws

    z = (mean + std * eps - shift) * scale,    eps ~ N(0, 1),

again in each epoch, so that the model sees more than one sample of each posterior.
"""

import collections
import dataclasses
import pathlib

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, check_labels, make_element
from trm_diffusion.data.shards import LISTED_FIELDS, MANIFEST_NAME, SHARD_FORM, ShardFile, ShardReader, read_about
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import build, check, read_json

FORMAT_VERSION = 1
RECORD_FORM = SHARD_FORM | {  # of a shard's JSON record
    "sha256": str, "class_counts": {str: int}, "bad_images": [{"name": str}], "num_classes": int, "latent": dict,
    "preparation": dict | None,
}  # fmt: skip

MANIFEST_FORM = {
    "records": int, "num_classes": int, "latent": dict, "preparation": dict | None, "bad_images": [{"name": str}],
    "class_counts": [int], "shards": [SHARD_FORM],
}  # fmt: skip

_HOW_TO_PREPARE = (
    "make latents with --mode=prepare and set config.data.path to their directory, "
    "or run without data with --config.data.source=synthetic"
)


class ShardWriter(ShardFile):
    """Writes one shard of latents.

    Args:
      directory: an existing directory.
      index: number of the shard.
      spec: what the latents are.
      num_classes: labels are 0 .. num_classes - 1; 0 for images with captions, whose labels are all 0.
      preparation: how the records were made; JSON, the same for all shards.
    """

    def __init__(
        self, directory: pathlib.Path, index: int, spec: LatentSpec, num_classes: int, preparation: dict | None = None
    ):
        super().__init__(directory / shard_name(index))
        self._spec, self._num_classes = spec, num_classes
        self._preparation = preparation
        self._class_counts, self.bad_images = collections.Counter(), []
        self._origins: list[str] = []

    def write(self, mean: np.ndarray, std: np.ndarray, label: int) -> None:
        """Appends one record: posterior mean and standard deviation [size, size, channels], unscaled.

        Raises:
          UserError: the shape is not the spec's, the label is out of range, or a value does not fit in float16.
        """
        self.append(self._encode(mean, std, label))
        if self._num_classes:
            self._class_counts[int(label)] += 1

    def note_origin(self, origin: str) -> None:
        """Keeps what the next image is made from; see data/origins.py."""
        self._origins.append(origin)

    def note_bad_image(self, name: str, reason: str) -> None:
        """Lists an image that has no record because it cannot be read."""
        self.bad_images.append({"name": name, "reason": reason})

    def _encode(self, mean: np.ndarray, std: np.ndarray, label: int) -> bytes:
        where = f"{self.path.name}, record {self.records}"
        shape = (self._spec.size, self._spec.size, self._spec.channels)
        check_labels([label], self._num_classes, lambda _: where)
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

    def about(self) -> dict:
        return {
            "class_counts": {str(label): count for label, count in sorted(self._class_counts.items())},
            "bad_images": self.bad_images,
            "num_classes": self._num_classes,
            "latent": dataclasses.asdict(self._spec),
            "preparation": self._preparation,
            **({"origins": self._origins} if any(self._origins) else {}),
        }


def shard_name(index: int) -> str:
    return f"latents-{index:05d}.array_record"


def read_shard_record(directory: pathlib.Path, index: int) -> dict | None:
    """The JSON record that `ShardWriter` wrote for a shard, or None if it is incomplete or the shard is missing."""
    return read_about(directory / shard_name(index), RECORD_FORM)


def assemble_manifest(shards: list[dict]) -> dict:
    """The manifest of a directory, from the JSON records of all its shards in order."""
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
        "shards": [{name: shard[name] for name in LISTED_FIELDS} for shard in shards],
    }


class LatentSource(Source):
    """Reads a directory of latents: `source[i]` is the scaled mean; `sample` draws from the posterior.

    Attributes:
      spec: the LatentSpec of the directory, for the checkpoint and the decoder.
      preparation: how --mode=prepare made the latents; None if something else did.
      bad_images: names of the images that have no record.

    Raises:
      UserError: the path is empty, the directory, the manifest or a shard is missing or damaged, or the format version
        differs.
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
        self._shard_hashes = {shard["file"]: shard.get("sha256", "") for shard in manifest["shards"]}

    @classmethod
    def from_config(cls, config: DataConfig) -> "LatentSource":
        if config.flip:
            raise UserError(
                "config.data.flip=true with config.data.source=latents: a flipped latent is not the latent "
                "of the flipped image; set flip=false here, and flip=true for --mode=prepare"
            )
        return cls(config.path)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return self._records.where(index)

    def shard_hashes(self) -> dict[str, str]:
        return self._shard_hashes

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
    """Unscaled mean and deviation, float32 [size, size, channels], and label. ValueError if the length is wrong."""
    shape = (spec.size, spec.size, spec.channels)
    length = 4 + 2 * 2 * int(np.prod(shape))
    if len(record) != length:
        raise ValueError(f"is {len(record)} bytes long, the manifest says {length}")
    label = int(np.frombuffer(record, "<i4", count=1)[0])
    mean, std = np.frombuffer(record, "<f2", offset=4).reshape(2, *shape).astype(np.float32)
    return mean, std, label


def read_manifest(directory: str) -> dict:
    """The validated manifest, with "latent" as a LatentSpec."""
    if not directory:
        raise UserError(f"config.data.source=latents needs config.data.path: {_HOW_TO_PREPARE}")
    path = local_path(directory, "config.data.path") / MANIFEST_NAME
    if not path.parent.is_dir():
        raise UserError(f"config.data.path={directory!r} does not exist: {_HOW_TO_PREPARE}")
    if not path.is_file():
        raise UserError(f"config.data.path={directory!r} has no {MANIFEST_NAME}: {_HOW_TO_PREPARE}")
    remedy = "prepare the latents again"
    manifest = read_json(path, {"format_version": int}, remedy)
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: {remedy}")
    check(manifest, MANIFEST_FORM, str(path), remedy)
    manifest["latent"] = build(LatentSpec, manifest["latent"], f"{path}: latent", remedy)
    records = sum(shard["records"] for shard in manifest["shards"])
    if (
        records != manifest["records"]
        or len(manifest["class_counts"]) != manifest["num_classes"]
        or (manifest["num_classes"] and sum(manifest["class_counts"]) != records)
    ):
        raise UserError(
            f"{path} counts {manifest['records']} records, its shards have {records}: prepare the latents again"
        )
    return manifest
