"""The inception score against its definition, and the influence of each image."""

import numpy as np
from scipy.special import softmax

from trm_diffusion.metrics.inception_score import inception_score


def score(p, weights=None):
    """exp of the mean KL divergence of rows p from their mean."""
    mean = np.average(p, axis=0, weights=weights)
    return np.exp(np.average((p * np.log(p / mean)).sum(axis=1), weights=weights))


def test_chunks_are_contiguous_and_the_last_is_what_is_left():
    logits = np.random.default_rng(0).standard_normal((25, 6)) * 2
    p = softmax(logits, axis=1)
    value, influence = inception_score(logits, chunk_images=10)
    np.testing.assert_allclose(value, np.mean([score(p[:10]), score(p[10:20]), score(p[20:])]), rtol=1e-12)
    assert influence.shape == (25,)


def test_influence_is_the_derivative_in_an_images_weight():
    logits = np.random.default_rng(0).standard_normal((20, 6))
    p, small = softmax(logits, axis=1), 1e-6
    _, influence = inception_score(logits)
    for image in (0, 7):
        weights = np.full(20, (1 - small) / 20)
        weights[image] += small
        np.testing.assert_allclose(influence[image], (score(p, weights) - score(p)) / small, rtol=1e-4)
