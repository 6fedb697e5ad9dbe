"""Layer norm and the gate's logits keep their precision where the mean is far larger than the standard deviation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trm_diffusion.models.layers import EPSILON, layer_norm, moments
from trm_diffusion.models.recursion.gate import Gate

WIDTH = 384
RATIOS = [0.0, 10.0, 100.0, 1000.0]  # of the mean to the standard deviation


def far_from_zero(ratio, *, outlier=0.0):
    """Tokens [2, 16, WIDTH] float32 of standard deviation 1 about `ratio`, with an outlier as first feature."""
    x = np.random.default_rng(0).standard_normal((2, 16, WIDTH)) + ratio
    x[..., 0] += outlier
    return x.astype(np.float32)


def normalized(x):
    """(normal, 1 / deviation) in float64."""
    x = np.asarray(x, np.float64)
    inverse = 1 / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    return (x - x.mean(-1, keepdims=True)) * inverse, inverse


@pytest.mark.parametrize("outlier", [0.0, 1000.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_layer_norm_is_precise_however_large_the_mean(ratio, outlier):
    x = far_from_zero(ratio, outlier=outlier)
    normal, inverse = normalized(x)
    np.testing.assert_allclose(jax.jit(moments)(x)[1], inverse, rtol=1e-6)
    # A float32 mean of 1,000 is rounded by 3e-5 at most, and summing 384 such numbers adds as much again.
    np.testing.assert_allclose(jax.jit(layer_norm)(x), normal, rtol=1e-5, atol=1e-5 + 2e-7 * ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_gradient_of_layer_norm_is_precise_too(ratio):
    x, cotangent = far_from_zero(ratio), np.random.default_rng(1).standard_normal((2, 16, WIDTH)).astype(np.float32)
    normal, inverse = normalized(x)
    along = np.mean(cotangent * normal, -1, keepdims=True)
    expected = inverse * (cotangent - cotangent.mean(-1, keepdims=True) - normal * along)
    found = jax.jit(jax.grad(lambda x: jnp.sum(layer_norm(x) * cotangent)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 + 2e-7 * ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_logits_of_tokens_are_precise_too(ratio):
    gate, x = Gate(WIDTH, 5, rngs=nnx.Rngs(0)), far_from_zero(ratio)
    kernel = np.asarray(gate.token_kernel[...], np.float64)[:, 0]
    found = jax.jit(gate.token_logits)(x)[:, :, 0]
    chex.assert_type(found, jnp.float32)
    expected = normalized(x)[0] @ kernel
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=(1e-6 + 4e-7 * ratio) * np.abs(expected).max())


def test_a_constant_token_is_normalized_to_zero():
    chex.assert_trees_all_close(layer_norm(jnp.full((3, WIDTH), 7.0)), jnp.zeros((3, WIDTH)), atol=1e-3)
