"""The Frechet distance against closed forms (more of them in the self-check), and the influence of each image."""

import chex
import numpy as np
import pytest

from trm_diffusion.metrics.frechet import StreamingMoments, frechet_and_influence, frechet_distance, moments
from trm_diffusion.metrics.intervals import bootstrap_interval


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_moments_are_the_unbiased_ones_in_float64():
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32) + 1000
    mean, covariance = moments(features)
    chex.assert_shape(mean, (4,))
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64).T, ddof=1), rtol=1e-9)
    assert mean.dtype == covariance.dtype == np.float64


def test_a_general_pair_agrees_with_the_eigenvalues_of_the_product():
    rng = np.random.default_rng(0)
    a, b = (factor @ factor.T for factor in rng.standard_normal((2, 6, 6)))
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = np.trace(a) + np.trace(b) - 2 * cross
    zero = np.zeros(6)
    np.testing.assert_allclose(frechet_distance(zero, a, zero, b), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(zero, b, zero, a), expected, rtol=1e-9)


def test_rank_deficient_covariances():
    """Two projections: onto the same line at different scales, onto orthogonal lines, and a point."""
    line, other = rotation(8, 0)[:, :2].T
    zero, flat = np.zeros(8), np.zeros((8, 8))
    a, b, c = 4 * np.outer(line, line), 9 * np.outer(line, line), 9 * np.outer(other, other)
    for pair, expected in (((a, b), 1), ((a, c), 13), ((a, flat), 4), ((flat, a), 4), ((flat, flat), 0)):
        np.testing.assert_allclose(frechet_distance(zero, pair[0], zero, pair[1]), expected, atol=1e-6)


@pytest.mark.parametrize("split", [[1, 0, 49], [7] * 7 + [1], [25, 25]])
def test_moments_do_not_depend_on_the_batches(split):
    features = np.random.default_rng(0).standard_normal((50, 4), np.float32) + 1000
    streaming = StreamingMoments(4)
    for batch in np.split(features, np.cumsum(split)[:-1]):
        streaming.update(batch)
    mean, covariance = moments(features)
    assert streaming.count == 50
    np.testing.assert_allclose(streaming.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(streaming.covariance(), covariance, rtol=1e-9)


def test_influence_is_the_derivative_in_an_images_weight():
    rng = np.random.default_rng(0)
    features, factor = rng.standard_normal((400, 5)), rng.standard_normal((5, 5))
    mean_b, covariance_b = rng.standard_normal(5), factor @ factor.T
    small = 1e-6
    distance, influence = frechet_and_influence(features, mean_b, covariance_b)
    np.testing.assert_allclose(distance, frechet_distance(*moments(features), mean_b, covariance_b), rtol=1e-12)
    assert abs(influence.mean()) < 1e-12

    def weighted_distance(weights):
        mean = weights @ features
        covariance = (features - mean).T @ ((features - mean) * weights[:, None]) * (400 / 399)
        return frechet_distance(mean, covariance, mean_b, covariance_b)

    even = np.full(400, 1 / 400)
    for image in (0, 100):
        weights = (1 - small) * even + small * (np.arange(400) == image)
        derivative = (weighted_distance(weights) - weighted_distance(even)) / small
        np.testing.assert_allclose(influence[image], derivative, atol=0.01 * influence.std())  # equal up to 1 / N


def test_fewer_rows_than_dimensions():
    """The distance is that of the moments; a row's influence is the same as in the space that the rows span."""
    features = np.random.default_rng(0).standard_normal((20, 50))
    distance, influence = frechet_and_influence(features, np.zeros(50), np.eye(50))
    np.testing.assert_allclose(distance, frechet_distance(*moments(features), np.zeros(50), np.eye(50)), rtol=1e-9)
    span = np.linalg.svd(features - features.mean(axis=0))[2][:19].T  # [50, 19]
    _, within = frechet_and_influence(features @ span, np.zeros(19), np.eye(19))
    np.testing.assert_allclose(influence, within, atol=1e-9)
    assert influence.std() > 0


def test_intervals_hold_the_true_distance_in_95_percent_of_experiments():
    rng = np.random.default_rng(0)
    spread, mean_b = np.array([1, 2, 0.5]), np.array([1.0, -1, 0.5])
    truth = frechet_distance(np.zeros(3), np.diag(spread**2), mean_b, np.eye(3))
    held = 0
    for _ in range(200):
        features = rng.standard_normal((400, 3)) * spread
        low, high = bootstrap_interval(*frechet_and_influence(features, mean_b, np.eye(3)), resamples=300)
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.99


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(3), np.array([[0, np.nan], [1, 1]])])
def test_bad_features_are_refused(features):
    with pytest.raises(ValueError, match="features"):
        moments(features)
