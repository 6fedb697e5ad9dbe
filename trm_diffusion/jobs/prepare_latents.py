"""The preparation job: images to a directory of latents (data/latents.py), which `--mode=verify` checks.

Images are cropped as ADM does, encoded to mean and standard deviation, and written in shards of consecutive images. A
shard depends on its images alone: it is made whole by one process, one that is there is not made again, and the
manifest is written by whichever process finds all shards there. So an interrupted job that is started again, and any
number of processes that share it, give the same bytes.
"""

import collections
import dataclasses
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import tqdm

import trm_diffusion
from trm_diffusion.config import Config
from trm_diffusion.data.base import Element, Source
from trm_diffusion.data.images import CROP_RULE, UnreadableImage
from trm_diffusion.data.latents import ShardWriter, read_shard_record, write_manifest
from trm_diffusion.data.shards import refuse_change
from trm_diffusion.data.sources import CAPTIONED_FILES, IMAGE_SOURCES, make_source
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.files import sha256_of_names
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.vae import VAE
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
    """Encodes the images of `config.data` by the autoencoder `data.vae` into the directory `out`.

    `data.image_size` counts latent cells, as it does in training; `data.flip` stores each image's mirror image as a
    record of its own, after it. An image that cannot be read has no record; the manifest names it. Captions are for
    `--mode=encode`.

    Args:
      images_per_shard: images, not records, of each shard but the last.
      process_index, process_count: this process makes every process_count-th shard from process_index on; JAX's own by
        default.

    Raises:
      UserError: data that hold no images, no autoencoder, or `out` holds shards that were made otherwise.
      Interrupted: asked to stop; the shards that are whole stay.
    """
    if not out:
        raise UserError("--mode=prepare needs --out=DIR, where the latents go")
    process_index, process_count = process_share(process_index, process_count, images_per_shard)
    if not config.data.vae:
        raise UserError("--mode=prepare needs --config.data.vae=DIR, an autoencoder that --mode=convert has written")
    vae, spec = config_vae(config)
    source = image_source(config, vae, spec)
    directory = pathlib.Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    preparation = preparation_of(config, source, spec, images_per_shard)
    count = -(-len(source) // images_per_shard)
    mine = range(process_index, count, process_count)
    done = {index for index in range(count) if is_done(directory, index, spec, preparation)}
    encode = Encoder(vae, spec)
    images = {
        index: range(index * images_per_shard, min((index + 1) * images_per_shard, len(source))) for index in mine
    }
    total, initial = sum(map(len, images.values())), sum(len(images[index]) for index in done & images.keys())
    with tqdm.tqdm(total=total, initial=initial, unit="image", mininterval=1, disable=None) as bar:
        for index in mine:
            if index not in done:
                with ShardWriter(directory, index, spec, source.num_classes, preparation) as writer:
                    write_shard(writer, source, images[index], encode, config.data.flip, stop, bar)
                say(f"shard {index + 1} of {count}: {writer.records:,} records, {len(writer.bad_images)} bad images")

    missing = sum(not is_done(directory, index, spec, preparation) for index in range(count))
    if missing:
        say(f"this process has made its shards; {missing} of {count} are still to come from others")
        return
    manifest = write_manifest(directory, [read_shard_record(directory, i) for i in range(count)], written_by())
    bad = manifest["bad_images"]
    say(f"wrote {directory}: {manifest['records']:,} records in {count} shards, {len(bad)} images could not be read")
    for image in bad[:10]:
        say(f"bad image {image['name']}: {image['reason']}")


def process_share(process_index: int | None, process_count: int | None, images_per_shard: int) -> tuple[int, int]:
    """Index and count of the processes that share a job, JAX's own by default. UserError where there are none such."""
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if images_per_shard < 1 or not 0 <= process_index < process_count:
        raise UserError(
            f"--images_per_shard={images_per_shard} must be at least 1, and --process_index={process_index} from 0 "
            f"to --process_count={process_count} less 1"
        )
    return process_index, process_count


def image_source(config: Config, vae: VAE, spec: LatentSpec) -> Source:
    """The images of `config.data`, cropped to what the autoencoder makes latents of `data.image_size` cells of."""
    sources = (*IMAGE_SOURCES, *CAPTIONED_FILES)
    if config.data.source not in sources:
        raise UserError(
            f"--mode=prepare encodes images; set config.data.source to one of {', '.join(sources)}, "
            f"not {config.data.source}"
        )
    pixels = {"image_size": spec.size * vae.config.factor, "channels": vae.config.image_channels}
    return make_source(dataclasses.replace(config.data, **pixels))


def preparation_of(config: Config, source: Source, spec: LatentSpec, images_per_shard: int) -> dict:
    """Everything that the bytes of a shard depend on, for its record and the manifest."""
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


def is_done(directory: pathlib.Path, index: int, spec: LatentSpec, preparation: dict) -> bool:
    """Is this shard whole? Raises UserError where it was made otherwise."""
    record = read_shard_record(directory, index)
    if record is None or not _holds_all(directory, record):
        return False
    before = {**(record["preparation"] or {}), **record["latent"]}
    refuse_change(directory, "latents", before, {**preparation, **dataclasses.asdict(spec)})
    return True


def _holds_all(directory: pathlib.Path, record: dict) -> bool:
    """Does the shard still hold as many records as were written? One that is cut short has lost the list of them."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(directory / record["file"])).num_records() == record["records"]


class Encoder:
    """Up to `batch_size` images [N, H, W, C] to mean and standard deviation [N, h, w, c] each, over local devices."""

    def __init__(self, vae: VAE, spec: LatentSpec):
        devices = jax.local_devices()
        mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
        self.batch_size = images_at_once(spec.size * vae.config.factor) * len(devices)
        self._encode = sharded_over_batch(vae, mesh, "batch", lambda vae, images: vae.encode(images))

    def __call__(self, images_bhwc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.resize(images_bhwc, (self.batch_size, *images_bhwc.shape[1:]))  # one shape, one compilation
        mean, std = self._encode(padded)
        return np.asarray(mean)[: len(images_bhwc)], np.asarray(std)[: len(images_bhwc)]


def write_shard(
    writer: ShardWriter, source: Source, indices: range, encode: Encoder, flip: bool, stop: StopRequest, bar: tqdm.tqdm
) -> None:
    """Reads, encodes and writes the images of one shard."""
    batch: list[Element] = []

    def write_batch() -> None:
        images = np.stack([element["image"] for element in batch])
        views = [encode(images), encode(images[:, :, ::-1])] if flip else [encode(images)]
        for row, element in enumerate(batch):
            for mean, std in views:
                writer.write(mean[row], std[row], element.get("label", 0))
        batch.clear()

    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as pool:
        for index, read in read_ahead(source, indices, pool, 2 * encode.batch_size):
            if stop.requested:
                pool.shutdown(cancel_futures=True)
                raise Interrupted(f"stopped at image {index:,} of {len(source):,}; the shards before it are whole")
            if isinstance(read, UnreadableImage):
                writer.note_bad_image(source.name(index), str(read))
            else:
                batch.append(read)
            if len(batch) == encode.batch_size:
                write_batch()
            bar.update()
    if batch:
        write_batch()


def read_ahead(
    source: Source, indices: range, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, Element | UnreadableImage]]:
    """Index and element of each image in order, or what is wrong with it; `ahead` of them are read beforehand."""

    def read(index: int) -> tuple[int, Element | UnreadableImage]:
        try:
            return index, source[index]
        except UnreadableImage as error:
            return index, error

    pending = collections.deque()
    for index in indices:
        pending.append(pool.submit(read, index))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def written_by() -> dict:
    """Versions, for the manifest."""
    packages = ("jax", "flax", "numpy", "pillow", "array_record")
    return {"version": trm_diffusion.__version__} | {name: importlib.metadata.version(name) for name in packages}
