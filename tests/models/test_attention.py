"""The attention kernel against XLA's attention: values, gradients, what it admits, and on several devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_diffusion.models.attention import dot_product_attention, reference_attention
from trm_diffusion.models.fused_attention import fits, fused_attention


def operands(n, m, heads=2, d=8, *, masked=False, dtype="float32"):
    """q, k, v, the mask or None, and a cotangent of the result."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.standard_normal((2, tokens, heads, d)), dtype) for tokens in (n, m, m, n))
    mask = None
    if masked:
        mask = rng.random((2, m)) > 0.3
        mask[1] = np.arange(m) == m - 1  # an image with one visible key
    return q, k, v, None if mask is None else jnp.asarray(mask), cotangent


def value_and_gradients(function, q, k, v, mask, cotangent):
    value, pullback = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
    return value, *pullback(cotangent)


def kernel(q, k, v, mask):
    return fused_attention(q, k, v, mask, True)


@pytest.mark.parametrize(
    "shape, tolerance",
    [
        (dict(n=16, m=16), 1e-5),
        (dict(n=21, m=35, heads=3, masked=True), 1e-5),
        (dict(n=300, m=1100, heads=4, masked=True), 1e-5),  # queries in parts, heads in groups
        (dict(n=64, m=64, d=72, dtype="bfloat16"), 0.03),
    ],
)
def test_the_kernel_is_attention(shape, tolerance):
    arguments = operands(**shape)
    found, expected = (value_and_gradients(f, *arguments) for f in (kernel, reference_attention))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


def test_the_kernel_runs_on_a_tpu_alone_and_where_it_fits():
    def loss(q, k, v):
        return dot_product_attention(q, k, v, implementation="fused").astype(jnp.float32).sum()

    def lowered(platform, n, d):
        x = jax.ShapeDtypeStruct((2, n, 4, d), jnp.bfloat16)
        return jax.jit(jax.value_and_grad(loss)).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()

    assert fits(*[jax.ShapeDtypeStruct((2, 1178, 24, 64), jnp.bfloat16)] * 2)  # SD3 at 512 pixels, with its text
    assert lowered("tpu", 256, 72).count("tpu_custom_call") == 2  # forward and backward
    assert "tpu_custom_call" not in lowered("cpu", 256, 72)
    assert "tpu_custom_call" not in lowered("tpu", 4096, 64)


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.models.test_attention import kernel, operands, reference_attention, value_and_gradients

mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
heads, images = NamedSharding(mesh, P("data", None, "tensor")), NamedSharding(mesh, P("data"))
q, k, v, mask, cotangent = operands(16, 24, heads=4, masked=True)
expected = value_and_gradients(reference_attention, q, k, v, mask, cotangent)
q, k, v, cotangent = jax.device_put((q, k, v, cotangent), heads)
step = jax.jit(lambda *x: value_and_gradients(kernel, *x)).lower(q, k, v, jax.device_put(mask, images), cotangent)
step = step.compile()
found = step(q, k, v, jax.device_put(mask, images), cotangent)
for a, b in zip(found, expected, strict=True):
    assert a.sharding.is_equivalent_to(heads, 4), a.sharding
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
assert "all-" not in step.as_text() and "collective" not in step.as_text()
"""


def test_each_device_runs_the_kernel_on_its_own_images_and_heads():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", SHARDED], env={**os.environ, "XLA_FLAGS": flags}, check=True)
