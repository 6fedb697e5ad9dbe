"""Precision and recall against distances between all pairs."""

import numpy as np
import pytest

from trm_diffusion.metrics import precision_recall as module
from trm_diffusion.metrics.precision_recall import precision_recall


def in_balls(points, centres, neighbours):
    """The definition, pair by pair, in float64."""

    def distances(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=-1)

    radii = np.sort(distances(centres, centres) + np.diag([np.inf] * len(centres)), axis=1)[:, neighbours - 1]
    return (distances(points, centres) <= radii).any(axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block_rows", [512, 16])
def test_equals_the_definition_for_any_block_size(monkeypatch, dtype, block_rows):
    monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(0)
    # Halves of small integers are exact in float16 too, and give many ties at the borders of balls.
    samples, reference = (rng.integers(-4, 5, (count, 4)).astype(np.float32) / 2 for count in (50, 37))
    samples += np.float32([1, 0, 0, 0])
    is_real, is_covered = precision_recall(samples, reference, 3, dtype)
    np.testing.assert_array_equal(is_real, in_balls(samples, reference, 3))
    np.testing.assert_array_equal(is_covered, in_balls(reference, samples, 3))
    assert 0 < is_real.mean() < 1 and 0 < is_covered.mean() < 1


def test_float16_that_overflows_is_refused():
    features = np.random.default_rng(0).normal(0, 300, (10, 8)).astype(np.float32)
    precision_recall(features, features)
    with pytest.raises(ValueError, match="overflow float16; use float32"):
        precision_recall(features, features, dtype="float16")


def test_too_few_images():
    few, many = np.zeros((3, 2), np.float32), np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="3 samples are too few: each needs 3 neighbours"):
        precision_recall(few, many)
