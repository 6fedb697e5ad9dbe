"""Checks of the metrics against known answers, which hold for any weights of the network."""

import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.metrics.adm import fid_name
from trm_diffusion.metrics.frechet import StreamingMoments, frechet_distance, moments
from trm_diffusion.metrics.inception_score import inception_score
from trm_diffusion.metrics.precision_recall import precision_recall
from trm_diffusion.models.inception import (
    convolution,
    fold_batch_norms,
    inception_features,
    network,
    network_input,
    random_state,
    resize_as_tf1,
)


def commuting_covariances() -> tuple[float, float, float]:
    """Frechet distance = ||difference of means||^2 + sum (sqrt a - sqrt b)^2 over common eigenvectors."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    a, b = rng.uniform(0, 5, (2, 64))
    mean_a, mean_b = rng.standard_normal((2, 64))
    distance = frechet_distance(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
    return distance, ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), 1e-8


def identical_sets() -> tuple[float, float, float]:
    """The Frechet distance of a set to itself in another order is 0, in 2048 dimensions from fewer images."""
    features = np.random.default_rng(0).standard_normal((500, 2048), np.float32)
    return frechet_distance(*moments(features), *moments(features[::-1])), 0, 1e-4


def shifted_gaussians() -> tuple[float, float, float]:
    """The distance between N(0, I) and N(1, I) is D."""
    return frechet_distance(np.zeros(300), np.eye(300), np.ones(300), np.eye(300)), 300, 1e-9


def streaming_moments() -> tuple[float, float, float]:
    """Rows in batches give the covariance of all rows; largest difference."""
    rows = np.random.default_rng(0).standard_normal((501, 20), np.float32) + 100
    streaming = StreamingMoments(20)
    for batch in np.array_split(rows, 7):
        streaming.update(batch)
    whole = np.cov(rows.astype(np.float64).T, ddof=1)
    return float(np.abs(streaming.covariance() - whole).max()), 0, 1e-10


def _line(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def precision_by_hand() -> tuple[float, float, float]:
    """Of {5.5, 100, 101, 102} only 5.5 is inside a ball of {0 .. 9}."""
    within, _ = precision_recall(_line(5.5, 100, 101, 102), _line(*range(10)))
    return within.mean(), 0.25, 0


def recall_by_hand() -> tuple[float, float, float]:
    """With three neighbours the ball of 5.5 reaches to 102, and so contains all of {0 .. 9}."""
    _, within = precision_recall(_line(5.5, 100, 101, 102), _line(*range(10)))
    return within.mean(), 1, 0


def _one_hot(classes: np.ndarray) -> np.ndarray:
    return 1e4 * np.eye(10)[classes]


def score_of_ten_classes() -> tuple[float, float, float]:
    """Inception score of certain answers, ten classes in turn: 10."""
    return inception_score(_one_hot(np.arange(100) % 10), chunk_images=50)[0], 10, 1e-9


def score_of_sorted_classes() -> tuple[float, float, float]:
    """Inception score of the same sorted by class, in two chunks: 5."""
    return inception_score(_one_hot(np.arange(100) // 10), chunk_images=50)[0], 5, 1e-9


def score_of_one_answer() -> tuple[float, float, float]:
    """Inception score of the same answer for all images: 1."""
    return inception_score(np.tile(np.arange(10.0), (100, 1)), chunk_images=50)[0], 1, 1e-9


def resize_by_formula() -> tuple[float, float, float]:
    """The resize against its formula in plain loops, down and up; largest difference, for a range of 2."""
    worst = 0.0
    for height, width in ((32, 40), (64, 50)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 1))
        expected = _resize_in_loops(image.astype(np.float64), 48)
        resized = np.asarray(resize_as_tf1(jnp.asarray(image[None], jnp.float32), 48))[0]
        worst = max(worst, np.abs(resized - expected).max() / 128)
    return worst, 0, 1e-6


def _resize_in_loops(image: np.ndarray, size: int) -> np.ndarray:
    height, width, channels = image.shape
    resized = np.zeros((size, size, channels))
    for row in range(size):
        for column in range(size):
            # TensorFlow computes source positions in float32.
            y = float(np.float32(row) * (np.float32(height) / np.float32(size)))
            x = float(np.float32(column) * (np.float32(width) / np.float32(size)))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            resized[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return resized


def sfid_tensor() -> tuple[float, float, float]:
    """The sFID features against channels 0 .. 6 of Mixed_6d.branch1x1, in NumPy from its input; relative difference."""
    weights = fold_batch_norms(random_state(0))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)

    @jax.jit
    def layer_input(weights, images):
        inputs = {}
        convolve = convolution(weights)

        def watched(x, layer, *arguments, **options):
            inputs[layer] = x
            return convolve(x, layer, *arguments, **options)

        network(network_input(images), watched)
        return inputs["Mixed_6d.branch1x1"]

    input_hwc = np.asarray(layer_input(weights, images))[0]
    kernel, bias = weights["Mixed_6d.branch1x1"]["kernel"][0, 0], weights["Mixed_6d.branch1x1"]["bias"]
    expected = np.maximum(input_hwc.reshape(17 * 17, 768) @ kernel[:, :7] + bias[:7], 0).reshape(2023)
    spatial = np.asarray(jax.jit(inception_features)(weights, images).spatial)[0]
    return float(np.abs(spatial - expected).max() / expected.max()), 0, 1e-5


def fid_50k_label() -> tuple[float, float, float]:
    """Only an FID over 50,000 images is called FID-50K."""
    names = [fid_name(count) for count in (49_999, 50_000, 50_001)]
    return sum(name == "FID-50K" for name in names), 1, 0


# Each returns (found, expected, tolerance).
CHECKS: tuple[Callable[[], tuple[float, float, float]], ...] = (
    commuting_covariances,
    identical_sets,
    shifted_gaussians,
    streaming_moments,
    precision_by_hand,
    recall_by_hand,
    score_of_ten_classes,
    score_of_sorted_classes,
    score_of_one_answer,
    resize_by_formula,
    sfid_tensor,
    fid_50k_label,
)


def selfcheck() -> bool:
    """Runs all checks and prints one JSON object; returns whether all pass."""
    results = {}
    for check in CHECKS:
        found, expected, tolerance = map(float, check())
        holds = abs(found - expected) <= tolerance
        results[check.__name__] = {"found": found, "expected": expected, "tolerance": tolerance, "pass": holds}
        print(f"{'ok  ' if holds else 'FAIL'} {check.__name__}: {check.__doc__.splitlines()[0]}", file=sys.stderr)
    passed = all(result["pass"] for result in results.values())
    print(json.dumps({"checks": results, "pass": passed}))
    return passed
