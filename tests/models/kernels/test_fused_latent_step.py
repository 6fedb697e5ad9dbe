"""The kernels of a latent step, in Pallas's interpreter, against the plain operations that they replace."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jobs.tiny import ROOT
from tests.models.recursion.small import INTERPRETED, SMALL, pretend_tpu
from trm_diffusion.models.kernels import fused_latent_step
from trm_diffusion.models.kernels.fused_latent_step import fits, fused_token_logits, fused_updates
from trm_diffusion.models.layers import layer_norm, modulate
from trm_diffusion.models.recursion import Conditioning, Recursion
from trm_diffusion.models.recursion.assignment import Assignment
from trm_diffusion.models.recursion.pool import Pool

WIDTH, RANK = 128, 128


class UpdatesOnly:
    """An attention without weights: the mean of q, k and v, and no base projection."""

    def project(self, x_bnd, update=None):
        return update

    def attend(self, qkv, context=None):
        return jnp.mean(qkv, axis=2).reshape(*qkv.shape[:2], -1)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def operands(images, tokens, choices, experts=2):
    """a, shift, scale, the gate's kernel, weights, A and B; and cotangents of the logits and of the updates."""
    rng = np.random.default_rng(0)
    block = normal(rng, images, tokens, WIDTH), *(0.3 * normal(rng, images, WIDTH) for _ in range(2))
    gate, weights = normal(rng, WIDTH, choices * experts), jnp.asarray(rng.random((images, tokens, choices, experts)))
    experts = [0.1 * normal(rng, 3, experts, RANK, WIDTH) for _ in range(2)]
    cotangents = normal(rng, images, tokens, gate.shape[1]), normal(rng, 3, images, tokens, WIDTH)
    return (*block, gate, jnp.float32(weights), *experts), cotangents


def plain(a, shift, scale, gate, weights, down, up):
    h = modulate(layer_norm(a), shift, scale)
    low = jnp.einsum("bnd,pmrd->bnpmr", h, down) * weights[..., None]
    return layer_norm(h) @ gate, jnp.einsum("bnpmr,pmrd->pbnd", low, up)


def fused(a, shift, scale, gate, weights, down, up):
    logits, a = INTERPRETED["fused_token_logits"](a, shift, scale, gate)
    return logits, jnp.stack(INTERPRETED["fused_updates"](a, shift, scale, weights, down, up))


@pytest.mark.parametrize(
    "images, tokens, choices",
    [(1, 128, 1), (2, 384, 3)],  # one program; both halves of the batch, each image in three parts
)
def test_values_and_gradients_are_those_of_the_plain_operations(images, tokens, choices):
    arguments, cotangents = operands(images, tokens, choices)
    found, expected = (jax.vjp(function, *arguments) for function in (fused, plain))
    for a, b in zip((*found[0], *found[1](cotangents)), (*expected[0], *expected[1](cotangents)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("ratio", [100.0, 1000.0])
def test_they_agree_with_the_plain_operations_where_the_mean_is_large(ratio):
    """States whose mean is `ratio` standard deviations: both norms are exact, so both see the same h."""
    (a, *rest), _ = operands(1, 128, 1)
    a = a + ratio
    for found, expected in zip(fused(a, *rest), plain(a, *rest), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=(2e-6 + 2e-7 * ratio) * np.abs(expected).max())


@pytest.mark.parametrize("scope", ["shared", "per_projection"])
def test_a_recursion_is_the_same_with_them(monkeypatch, scope):
    """Values, the report, and all gradients, with three latent steps and dropped tokens."""
    config = dataclasses.replace(SMALL, rank=RANK, latent_steps=3, routing_scope=scope, remat="full")
    rng = np.random.default_rng(0)
    x, shift, scale, *y = normal(rng, 4, 128, WIDTH), *(0.3 * normal(rng, 4, WIDTH) for _ in range(4))
    model = nnx.eval_shape(lambda: Recursion(WIDTH, 2, config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: 0.1 * normal(rng, *leaf.shape), nnx.as_pure(state))
    cotangent = normal(rng, 4, 128, 3, 2, WIDTH // 2)

    def loss(state, x, shift, scale):
        out = nnx.merge(graphdef, state)(
            x,
            shift_bd=shift,
            scale_bd=scale,
            conditioning=Conditioning(*y),
            attention=UpdatesOnly(),
            key=jax.random.key(0),
        )
        return jnp.sum(out.qkv * cotangent), out.report

    def run():
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(state, x, shift, scale)

    expected = run()
    calls = pretend_tpu(monkeypatch, tokens=128)
    found = run()
    assert set(calls) == set(INTERPRETED) and expected[0][1].drop_fraction.max() > 0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1e-3))


def test_they_lower_for_a_tpu():
    """Four kernels, in bfloat16 at DiT-XL's sizes; nothing is compiled."""
    arguments, _ = jax.eval_shape(lambda: operands(2, 256, 1))
    block, rest = arguments[:3], arguments[3:]

    def wide(x, dtype):
        return jax.ShapeDtypeStruct((*x.shape[:-1], 1152) if x.shape[-1] == WIDTH else x.shape, dtype)

    block = [wide(x, jnp.bfloat16) for x in block]
    gate, weights, *experts = jax.ShapeDtypeStruct((1152, 2), jnp.float32), rest[1], *rest[2:]
    experts = [wide(x, jnp.bfloat16) for x in experts]

    def loss(a, shift, scale, gate, weights, down, up):
        logits, a = fused_token_logits(a, shift, scale, gate)
        return jnp.sum(logits) + sum(jnp.sum(x) for x in fused_updates(a, shift, scale, weights, down, up))

    program = jax.jit(jax.grad(loss, range(7))).trace(*block, gate, weights, *experts)
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 4


def test_which_sizes_fit():
    assert fits(256, 1152, 2, 128, jnp.bfloat16) and fits(4096, 1536, 2, 128, jnp.bfloat16)
    for sizes in ((250, 1152, 2, 128), (256, 1152, 2, 64), (256, 1152, 16, 128), (256, 1100, 2, 128)):
        assert not fits(*sizes, jnp.bfloat16), sizes
    assert not fits(256, 1152, 2, 128, jnp.float32)
    assert fused_latent_step.TOKENS[0] % fused_latent_step.LANES == 0


def test_only_a_tpu_takes_them(monkeypatch):
    monkeypatch.setattr(fused_latent_step, "fits", lambda *sizes: pytest.fail("a CPU asked for the kernels"))
    test_config = dataclasses.replace(SMALL, latent_steps=2)
    model = Recursion(8, 2, test_config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    y = jnp.ones((4, 8))
    model(
        jnp.ones((4, 3, 8)),
        shift_bd=y,
        scale_bd=y,
        conditioning=Conditioning(y, y),
        attention=UpdatesOnly(),
        key=jax.random.key(0),
    )


def fused_by_pool(a, shift, scale, gate, weights, down, up):
    """Like `fused`, through the pool's methods that divide the work over devices."""
    config = dataclasses.replace(SMALL, rank=RANK)
    both = nnx.eval_shape(lambda: Pool(WIDTH, config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    both.gate.token_kernel = nnx.Param(gate[:, None, :])
    both.experts.down, both.experts.up = nnx.Param(down), nnx.Param(up)
    logits, *state = both._token_logits_by_kernel(a, shift, scale)
    nothing = jnp.zeros(weights.shape, bool)
    updates = both._updates_by_kernel(*state, Assignment(weights, nothing, nothing, nothing))
    return logits[:, :, 0], jnp.moveaxis(updates, 2, 0)


def test_each_device_runs_them_on_its_own_images_and_heads():
    """The batch and the heads in two shards each; gradients of what all devices hold are summed over devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "tests.models.kernels.sharded_latent_step"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, check=True)
