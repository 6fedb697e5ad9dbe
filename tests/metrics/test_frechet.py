"""The Frechet distance against closed forms."""

import chex
import numpy as np
import pytest

from trm_diffusion.metrics.frechet import frechet_distance, moments


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_moments_are_the_unbiased_ones_in_float64():
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32) + 1000
    mean, covariance = moments(features)
    chex.assert_shape(mean, (4,))
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64).T, ddof=1), rtol=1e-9)
    assert mean.dtype == covariance.dtype == np.float64


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    basis = rotation(12, 1)
    a, b = rng.uniform(0, 5, (2, 12))
    mean_a, mean_b = rng.standard_normal((2, 12))
    distance = frechet_distance(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    np.testing.assert_allclose(distance, expected, rtol=1e-10)


def test_a_general_pair_agrees_with_the_eigenvalues_of_the_product():
    rng = np.random.default_rng(0)
    a, b = (factor @ factor.T for factor in rng.standard_normal((2, 6, 6)))
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = np.trace(a) + np.trace(b) - 2 * cross
    zero = np.zeros(6)
    np.testing.assert_allclose(frechet_distance(zero, a, zero, b), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(zero, b, zero, a), expected, rtol=1e-9)


def test_shifted_unit_gaussians():
    identity = np.eye(32)
    distance = frechet_distance(np.zeros(32), identity, np.ones(32), identity)
    np.testing.assert_allclose(distance, 32, rtol=1e-12)


def test_identical_wide_features_with_fewer_rows_than_dimensions():
    mean, covariance = moments(np.random.default_rng(0).standard_normal((300, 2048)))
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-4


def test_rank_deficient_covariances():
    """Two projections: onto the same line at other scales, onto orthogonal lines, and a point."""
    line, other = rotation(8, 0)[:, :2].T
    zero, flat = np.zeros(8), np.zeros((8, 8))
    a, b, c = 4 * np.outer(line, line), 9 * np.outer(line, line), 9 * np.outer(other, other)
    for pair, expected in (((a, b), 1), ((a, c), 13), ((a, flat), 4), ((flat, a), 4), ((flat, flat), 0)):
        np.testing.assert_allclose(frechet_distance(zero, pair[0], zero, pair[1]), expected, atol=1e-6)


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(3), np.array([[0, np.nan], [1, 1]])])
def test_bad_features_are_refused(features):
    with pytest.raises(ValueError, match="features"):
        moments(features)
