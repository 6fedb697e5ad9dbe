"""The preparation job: encodes images into a directory of latents (data/latents.py), which `--mode=verify` checks.

Images are cropped as in ADM, encoded to mean and standard deviation, and written in shards of consecutive images
(data/sharded.py).
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from trm_diffusion.config import Config
from trm_diffusion.data.base import Element, Source, check_labels
from trm_diffusion.data.images import CROP_RULE
from trm_diffusion.data.latents import ShardWriter, assemble_manifest, read_shard_record
from trm_diffusion.data.origins import changed, origin_of
from trm_diffusion.data.sharded import ShardedJob, consecutive_ranges, make_shards, process_share
from trm_diffusion.data.sources import IMAGE_FILE_SOURCES, make_source
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_names
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.vae import VAE
from trm_diffusion.readers.images import UnreadableImage
from trm_diffusion.readers.paths import local_path
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.decoder import config_vae, images_at_once, sharded_over_batch
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.weights.store import load_weights

MAX_READERS = 32  # threads that read and decode pictures


def prepare(
    config: Config,
    out: str,
    stop: StopRequest,
    *,
    images_per_shard: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> None:
    """Encodes the images of `config.data` with the autoencoder `data.vae` into the directory `out`.

    `data.image_size` counts latent cells, as in training. `data.flip` stores the mirror image of each image as the next
    record. An image that cannot be read has no record and is listed in the manifest. Captions need `--mode=encode`.

    Args:
      images_per_shard: images (not records) per shard; the last shard may have fewer.
      process_index, process_count: this process makes every process_count-th shard, starting at process_index; JAX's
        own by default.

    Raises:
      UserError: data without images, no autoencoder, or `out` is in use, or holds shards made with other settings or
        from images that have changed since.
      Interrupted: asked to stop; complete shards are kept.
    """
    if not out:
        raise UserError("--mode=prepare needs --out=DIR, the directory to write")
    directory = local_path(out, "--out")
    share = process_share(process_index, process_count, images_per_shard)
    if not config.data.vae:
        raise UserError("--mode=prepare needs --config.data.vae=DIR, an autoencoder written by --mode=convert")
    with claimed(directory, "--mode=prepare", stop, share):
        manifest = make_shards(LatentJob(config, directory, images_per_shard), share, stop)
    if manifest is None:
        return
    records, shards, bad = manifest["records"], len(manifest["shards"]), manifest["bad_images"]
    say(f"wrote {out}: {records:,} records in {shards} shards, {len(bad)} images could not be read")
    for image in bad[:10]:
        say(f"bad image {image['name']}: {image['reason']}")


def image_source(config: Config, vae: VAE, spec: LatentSpec) -> Source:
    """The images of `config.data`, cropped to the size whose latents have `data.image_size` cells a side."""
    if config.data.source not in IMAGE_FILE_SOURCES:
        raise UserError(
            f"--mode=prepare encodes images; set config.data.source to one of {', '.join(IMAGE_FILE_SOURCES)}, "
            f"not {config.data.source}"
        )
    pixels = {"image_size": spec.size * vae.config.factor, "channels": vae.config.image_channels}
    return make_source(dataclasses.replace(config.data, **pixels))


def preparation_of(config: Config, source: Source, spec: LatentSpec, images_per_shard: int) -> dict:
    """All settings that the bytes of a shard depend on, for its record and the manifest."""
    record = load_weights(config.data.vae).record
    return {
        "data": config.data.source,
        "tfds_name": config.data.tfds_name if config.data.source.startswith("tfds") else None,
        "split": config.data.split if config.data.source.startswith("tfds") else None,
        "images": len(source),
        "names_sha256": sha256_of_names(source.name(index) for index in range(len(source))),
        "image_size": source.sample_shape[0],
        "crop": CROP_RULE,
        "flip": config.data.flip,
        "images_per_shard": images_per_shard,
        "vae": {"id": spec.vae_id, "layout": record.get("layout"), "files": record.get("files")},
    }


class LatentJob(ShardedJob):
    """Shards of latents of consecutive images. Raises UserError if the data or the autoencoder cannot be used."""

    contents, unit = "latents", "image"

    def __init__(self, config: Config, directory: pathlib.Path, images_per_shard: int):
        vae, self._spec = config_vae(config)
        self._source = image_source(config, vae, self._spec)
        self._preparation = preparation_of(config, self._source, self._spec, images_per_shard)
        self._images = consecutive_ranges(len(self._source), images_per_shard)
        self._flip = config.data.flip
        self._encode = LatentEncoder(vae, self._spec)
        self.directory = directory
        self.sizes = [*map(len, self._images)]
        self.made_with = self._preparation | dataclasses.asdict(self._spec)

    def read_record(self, index: int) -> dict | None:
        return read_shard_record(self.directory, index)

    def made_with_of(self, record: dict) -> dict:
        return (record["preparation"] or {}) | record["latent"]

    def changed_items(self, index: int, record: dict) -> list[str]:
        images = self._images[index]
        origins = record.get("origins") or [""] * len(images)
        return [self._source.name(image) for image in changed(self._source, images, origins)]

    def write_shard(self, index: int, advance: Callable[[int], None]) -> str:
        batch: list[Element] = []
        with (
            ShardWriter(self.directory, index, self._spec, self._source.num_classes, self._preparation) as writer,
            contextlib.closing(read_ahead(self._source, self._images[index], 2 * self._encode.batch_size)) as reads,
        ):
            for image, read, origin in reads:
                advance(1)
                writer.note_origin(origin)
                if isinstance(read, UnreadableImage):
                    writer.note_bad_image(self._source.name(image), str(read))
                else:
                    label = [read.get("label", 0)]
                    check_labels(label, self._source.num_classes, lambda _, image=image: self._source.name(image))
                    batch.append(read)
                if len(batch) == self._encode.batch_size:
                    self._write_batch(writer, batch)
                    batch.clear()
            if batch:
                self._write_batch(writer, batch)
        return f"{writer.records:,} records, {len(writer.bad_images)} bad images"

    def _write_batch(self, writer: ShardWriter, batch: list[Element]) -> None:
        images = np.stack([element["image"] for element in batch])
        views = [images, images[:, :, ::-1]] if self._flip else [images]
        moments = [self._encode(view) for view in views]
        for row, element in enumerate(batch):
            for mean, std in moments:
                writer.write(mean[row], std[row], element.get("label", 0))

    def assemble_manifest(self, records: list[dict]) -> dict:
        return assemble_manifest(records)

    def written_by(self) -> dict[str, str]:
        packages = ("jax", "flax", "numpy", "pillow", "array_record")
        return {name: importlib.metadata.version(name) for name in packages}


class LatentEncoder:
    """Encodes up to `batch_size` images [N, H, W, C], on local devices, to mean and std [N, h, w, c]."""

    def __init__(self, vae: VAE, spec: LatentSpec):
        devices = jax.local_devices()
        mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
        self.batch_size = images_at_once(spec.size * vae.config.factor) * len(devices)
        self._encode = sharded_over_batch(vae, mesh, "batch", lambda vae, images: vae.encode(images))

    def __call__(self, images_bhwc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.resize(images_bhwc, (self.batch_size, *images_bhwc.shape[1:]))  # one shape, one compilation
        mean, std = self._encode(padded)
        return np.asarray(mean)[: len(images_bhwc)], np.asarray(std)[: len(images_bhwc)]


def read_ahead(source: Source, indices: range, ahead: int) -> Iterator[tuple[int, Element | UnreadableImage, str]]:
    """Yields index, element (or read error) and origin of each image in order; threads read up to `ahead` more."""

    def read(index: int) -> tuple[int, Element | UnreadableImage, str]:
        origin = origin_of(source, index)
        try:
            return index, source[index], origin
        except UnreadableImage as error:
            return index, error, origin

    pool = ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1))
    pending = collections.deque()
    try:
        for index in indices:
            pending.append(pool.submit(read, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
