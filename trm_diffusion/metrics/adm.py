"""The ADM protocol (Dhariwal & Nichol, 2021): FID, sFID, inception score, precision and recall against a reference.

A reference file is an npz with `mu`, `sigma` of the pool features and `mu_s`, `sigma_s` of the spatial features over a
whole data set. Its `arr_0` has some of the images (10,000 by convention), for precision and recall.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file
from trm_diffusion.metrics.frechet import StreamingMoments, frechet_and_influence
from trm_diffusion.metrics.image_sets import ImageSet, NpzImages
from trm_diffusion.metrics.inception_score import CHUNK_IMAGES, inception_score
from trm_diffusion.metrics.intervals import bootstrap_interval
from trm_diffusion.metrics.precision_recall import NEIGHBOURS, precision_recall
from trm_diffusion.models.inception import Features, Weights, inception_features
from trm_diffusion.readers.arrays import NpzFile
from trm_diffusion.readers.paths import any_path

POOL_WIDTH, SPATIAL_WIDTH = 2048, 2023
FID_50K_IMAGES = 50_000
REFERENCE_IMAGES = 10_000
PROTOCOL = {
    "name": "ADM",
    "network": "FID Inception, graph of 2015-12-05",
    "resize": "TensorFlow 1 bilinear to 299: output i reads input i * in / out; no half-pixel centres, no antialias",
    "fid_features": "pool_3, 2048-d",
    "sfid_features": "first 7 channels of Mixed_6d, 2023-d",
    "inception_score_chunk_images": CHUNK_IMAGES,
    "precision_recall_neighbours": NEIGHBOURS,
}

_forward = jax.jit(inception_features)


class Statistics(NamedTuple):
    mean: np.ndarray  # [D] float64
    covariance: np.ndarray  # [D, D] float64


class Reference(NamedTuple):
    pool: Statistics
    spatial: Statistics
    images: NpzImages
    sha256: str  # of the file


def features_of(weights: Weights, images: ImageSet, batch_size: int, title: str) -> Iterator[Features]:
    """Yields the features of all images in order, in batches, as NumPy arrays.

    Each process reads a share of the batches and computes it on its own devices; the features are gathered everywhere.
    """
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("image",))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("image",), ()))
    weights = jax.device_put(weights, everywhere)
    size = -(-min(batch_size, len(images)) // len(devices)) * len(devices)
    processes = jax.process_count()

    def started() -> Iterator[Features]:
        for batch in images.batches(size, share=(jax.process_index(), processes)):
            padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
            yield _forward(weights, jax.device_put(padded, split))

    batches = started()
    ahead = next(batches)  # the devices work on one batch while the next is read
    done = 0
    with tqdm.tqdm(total=len(images), desc=title, unit="image", mininterval=1) as bar:
        while ahead:
            features, ahead = ahead, next(batches, None)
            count = min(processes * size, len(images) - done)
            yield Features(*(part[:count] for part in multihost_utils.process_allgather(features, tiled=True)))
            done += count
            bar.update(count)


def adm_metrics(samples: Features, reference: Reference, reference_pool: np.ndarray, precision_dtype: str) -> dict:
    """The five metrics of N samples, each with a 95% bootstrap interval over the images.

    Args:
      samples: features of the samples, in the order drawn.
      reference: the reference to compare with.
      reference_pool: [M, 2048] pool features of the reference's images.
      precision_dtype: "float32" or "float16", for precision and recall.
    """
    score, score_influence = inception_score(samples.logits)
    is_real, is_covered = precision_recall(samples.pool, reference_pool, dtype=precision_dtype)
    figures = {
        "fid": frechet_and_influence(samples.pool, *reference.pool),
        "sfid": frechet_and_influence(samples.spatial, *reference.spatial),
        "inception_score": (score, score_influence),
        "precision": (is_real.mean(), is_real - is_real.mean()),
        "recall": (is_covered.mean(), is_covered - is_covered.mean()),
    }
    return {
        "num_images": len(samples.pool),
        "fid_name": fid_name(len(samples.pool)),
        **{name: float(value) for name, (value, _) in figures.items()},
        "intervals_95": {name: bootstrap_interval(*figure) for name, figure in figures.items()},
    }


def fid_name(num_images: int) -> str:
    """The name of an FID over this many samples."""
    return "FID-50K" if num_images == FID_50K_IMAGES else f"FID of {num_images} images, not FID-50K"


def warnings_about(images: ImageSet) -> list[str]:
    """Problems with a set of samples that still allow measuring it."""
    warnings = []
    if len(images) < POOL_WIDTH:
        warnings.append(
            f"{len(images)} images are fewer than {POOL_WIDTH} feature dimensions: FID and sFID are far too high; "
            "compare them only with those of as many images"
        )
    if images.sorted_by_class() and len(images) > CHUNK_IMAGES:
        warnings.append(f"the images are sorted by class: the inception score, in chunks of {CHUNK_IMAGES}, is too low")
    return warnings


def read_reference(path: str) -> Reference:
    """Reads a reference file. Raises UserError if it is missing or has another layout."""
    location = any_path(path, "--reference")
    if not location.exists():
        raise UserError(f"--reference={path}: no such file; make one with --mode=reference")
    images = NpzImages(location)
    file = NpzFile(location)
    statistics = []
    for mean, covariance, width in (("mu", "sigma", POOL_WIDTH), ("mu_s", "sigma_s", SPATIAL_WIDTH)):
        if mean not in file.headers or covariance not in file.headers:
            raise UserError(f"{path} has no {mean} and {covariance}: make a reference with --mode=reference")
        arrays = file.read(mean, (width,), kinds="f"), file.read(covariance, (width, width), kinds="f")
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(f"{path}: {mean} or {covariance} is not finite: make a reference with --mode=reference")
        statistics.append(Statistics(*(np.asarray(array, np.float64) for array in arrays)))
    return Reference(*statistics, images, sha256_of_file(location))


def reference_arrays(weights: Weights, images: ImageSet, batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a reference file: statistics over all images, and 10,000 random ones in their original order."""
    pool, spatial = StreamingMoments(POOL_WIDTH), StreamingMoments(SPATIAL_WIDTH)
    for features in _in_chunks(features_of(weights, images, batch_size, "reference"), rows=POOL_WIDTH):
        pool.update(features.pool)
        spatial.update(features.spatial)
    chosen = np.random.default_rng(seed).permutation(len(images))[:REFERENCE_IMAGES]
    return {
        "arr_0": images.take(np.sort(chosen)),
        "mu": pool.mean,
        "sigma": pool.covariance(),
        "mu_s": spatial.mean,
        "sigma_s": spatial.covariance(),
    }


def concatenated(batches: Iterable[Features]) -> Features:
    return Features(*map(np.concatenate, zip(*batches, strict=True)))


def _in_chunks(batches: Iterable[Features], rows: int) -> Iterator[Features]:
    """Merges features into larger batches: updating a covariance costs the same for one row as for many."""
    held: list[Features] = []
    for batch in batches:
        held.append(batch)
        if sum(len(features.pool) for features in held) >= rows:
            yield concatenated(held)
            held = []
    if held:
        yield concatenated(held)
