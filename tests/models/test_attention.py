"""Our attention against JAX's: values and gradients, the kernel for each platform, and several devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from tests.jobs.tiny import ROOT
from trm_diffusion.models.attention import dot_product_attention, xla_attention
from trm_diffusion.models.kernels.fused_attention import fits, fused_attention
from trm_diffusion.models.kernels.splash_attention import splash_attention


def operands(n, m, heads=2, d=8, *, images=2, masked=False, dtype="float32"):
    """q, k, v, the mask or None, and a cotangent of the result."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.standard_normal((images, tokens, heads, d)), dtype) for tokens in (n, m, m, n)
    )
    mask = None
    if masked:
        mask = rng.random((images, m)) > 0.3
        mask[1] = np.arange(m) == m - 1  # an image with one visible key
    return q, k, v, None if mask is None else jnp.asarray(mask), cotangent


def value_and_gradients(function, q, k, v, mask, cotangent):
    value, pullback = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
    return value, *pullback(cotangent)


def reference_attention(q, k, v, mask=None):
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def fused(q, k, v, mask=None):
    return fused_attention(q, k, v, mask, True)


def splash(q, k, v, mask=None):
    return splash_attention(q, k, v, mask, True)


@pytest.mark.parametrize(
    "kernel, shape, tolerance",
    [
        (xla_attention, dict(n=21, m=35, heads=3), 1e-5),
        (xla_attention, dict(n=21, m=35, masked=True), 1e-5),
        (xla_attention, dict(n=64, m=64, d=72, dtype="bfloat16"), 0.03),
        (fused, dict(n=16, m=16), 1e-5),
        (fused, dict(n=21, m=35, heads=3, masked=True), 1e-5),
        (fused, dict(n=300, m=1100, heads=4, masked=True), 1e-5),  # queries split into parts, heads into groups
        (fused, dict(n=64, m=64, d=72, dtype="bfloat16"), 0.03),
        (splash, dict(n=40, m=40), 1e-5),  # less than a block
        (splash, dict(n=512, m=600, d=64, masked=True), 1e-5),
    ],
)
def test_the_kernel_is_attention(kernel, shape, tolerance):
    arguments = operands(**shape)
    found, expected = (value_and_gradients(f, *arguments) for f in (kernel, reference_attention))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


def lowered(platform: str, n: int, d: int, dtype="bfloat16", implementation="auto", masked=False) -> str:
    """The lowered program of attention and its gradients; the platform need not be present."""

    def loss(q, k, v, mask):
        return dot_product_attention(q, k, v, mask, implementation=implementation).astype(jnp.float32).sum()

    x, mask = jax.ShapeDtypeStruct((2, n, 4, d), dtype), jax.ShapeDtypeStruct((2, n), bool) if masked else None
    return jax.jit(jax.value_and_grad(loss)).trace(x, x, x, mask).lower(lowering_platforms=(platform,)).as_text()


def test_one_program_text_takes_each_platforms_kernel():
    assert fits(*[jax.ShapeDtypeStruct((2, 1178, 24, 64), jnp.bfloat16)] * 2)  # SD3 at 512 pixels, with its text
    call = "tpu_custom_call"
    assert lowered("tpu", 256, 72).count(call) == 2  # fused: forward and backward
    assert lowered("tpu", 4429, 64, masked=True).count(call) == 3  # splash: forward, dq, dk and dv
    assert lowered("tpu", 256, 72, implementation="splash").count(call) == 3
    for xla in (
        lowered("cpu", 256, 72),
        lowered("tpu", 256, 72, dtype="float32"),
        lowered("tpu", 256, 72, implementation="xla"),
        lowered("tpu", 4429, 64, implementation="fused"),
        lowered("tpu", 256, 72, implementation="cudnn"),
    ):
        assert call not in xla


def test_the_program_for_nvidia_gpus_calls_cudnn(monkeypatch):
    """JAX queries the GPU's versions; here the test fakes the answers, and nothing is compiled."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda version: False)
    assert lowered("cuda", 256, 72).count("@__cudnn") == 2  # forward and backward
    assert lowered("cuda", 84, 32, masked=True).count("ScaleBias") >= 2  # the mask is a bias
    for xla in (dict(n=85, d=32), dict(n=84, d=12), dict(n=84, d=32, dtype="float32")):
        assert "cudnn" not in lowered("cuda", **xla)


def test_each_device_runs_the_kernel_on_its_own_images_and_heads():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.models.sharded_attention"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, check=True)
