"""The trace of the latent steps against the plain reference, and through whole models."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.recursion.reference import rms_norm, softmax
from tests.models.recursion.small import HEADS, IMAGES, SMALL, TEXT, TOKENS, WIDTH, as_reference, build, inputs
from tests.models.recursion.small import run_reference as run_reference_on
from trm_diffusion.models.attention import Context
from trm_diffusion.models.dit import DiT, DiTConfig
from trm_diffusion.models.mmdit import JointConfig, MMDiT, MMDiTConfig
from trm_diffusion.models.recursion.observe import Observation
from trm_diffusion.models.text import Text

SIZES = dict(depth=3, width=16, heads=2, patch=2, dtype="float32")
RECURSIVE = dataclasses.replace(SMALL, blocks="0,2", latent_steps=3)


def mean_attention(qkv, norms, context):
    """The mean over heads of the softmax of one image's q, k, v [N, 3, D], and of a text's keys: [N, M]."""
    d, total = WIDTH // HEADS, 0
    for head in range(HEADS):
        queries, keys = (qkv[:, i, head * d : (head + 1) * d] for i in range(2))
        if norms is not None:
            queries, keys = (
                np.stack([rms_norm(row, norm) for row in rows])
                for rows, norm in zip((queries, keys), norms, strict=True)
            )
        if context is not None:
            keys = np.concatenate([keys, context[:, head]])
        total = total + np.stack([softmax(row) for row in queries @ keys.T / d**0.5])
    return total / HEADS


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, dict(base_every_step=True, base_input="carry"), dict(halting="convergence", halting_epsilon=0.6)]
)
def test_states_and_attention_equal_the_reference(fields, joint):
    config, data = dataclasses.replace(SMALL, latent_steps=4, **fields), inputs()
    graphdef, state = build(config, qk_norm=True)
    attention, recursion = nnx.merge(graphdef, state)
    x, shift, scale, conditioning, context = data
    out = recursion(
        x, shift_bd=shift, scale_bd=scale, conditioning=conditioning, attention=attention, observe=True,
        context=Context(*context) if joint else None,
    )  # fmt: skip
    trace = out.report.observed.trace
    assert trace.decoded is None
    chex.assert_shape(trace.attention, (4, IMAGES, TOKENS, TOKENS + (TEXT if joint else 0)))

    arguments = as_reference(graphdef, state, data, joint=joint)
    expected = run_reference_on(arguments, config, steps=4)
    attended, states = zip(*expected.trajectory, strict=True)
    ran = np.flatnonzero(out.report.ran)  # the trace of a latent step that did not run is zero
    assert len(ran) == 4 or config.halting != "none"
    states = np.where(np.asarray(out.report.ran)[:, None, None, None] > 0, np.stack([arguments["x"], *states]), 0)
    np.testing.assert_allclose(trace.state, states, rtol=1e-5, atol=1e-5)
    keys = np.asarray(context[0], np.float64) if joint else [None] * IMAGES
    for t, qkv in enumerate([*attended, expected.qkv]):
        for image in range(IMAGES):
            weights = mean_attention(qkv[image], arguments["norms"], keys[image])
            np.testing.assert_allclose(trace.attention[t, image], weights if t in ran else 0, rtol=1e-4, atol=1e-5)


def test_a_masked_context_is_not_attended_to():
    graphdef, state = build(SMALL)
    attention, _ = nnx.merge(graphdef, state)
    keys, values = inputs()[4]
    mask = jnp.arange(TEXT)[None] < jnp.asarray([[2], [0], [5], [1]])
    qkv = jax.random.normal(jax.random.key(1), (IMAGES, TOKENS, 3, HEADS, WIDTH // HEADS))
    weights = attention.weights(qkv, Context(keys, values, mask))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(
        weights[..., TOKENS:] > 0, np.broadcast_to(mask[:, None], weights[..., TOKENS:].shape)
    )


def models():
    dit = DiTConfig(**SIZES, recursion=RECURSIVE)
    mmdit = MMDiTConfig(**SIZES, recursion=RECURSIVE, mmdit=JointConfig(position_max_size=4, position_base_size=4))
    rng, shapes = np.random.default_rng(0), dict(image_size=4, in_channels=3, out_channels=3)
    states, pooled = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 5, 8), (2, 6)))
    text = Text(states, jnp.ones((2, 5), bool), pooled)
    yield DiT(dit, **shapes, num_classes=10, rngs=nnx.Rngs(0)), jnp.asarray([3, 5])
    yield MMDiT(mmdit, **shapes, text_features=8, pooled_features=6, rngs=nnx.Rngs(0)), text


@pytest.mark.parametrize("index", [0, 1])
def test_a_model_decodes_its_states_and_draws_the_same(index):
    model, condition = list(models())[index]
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(1)  # zero-initialised gates would hide the blocks
    state = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), state)
    model = nnx.merge(graphdef, state)
    images, times = jnp.asarray(rng.standard_normal((2, 4, 4, 3), np.float32)), jnp.asarray([100.0, 900.0])
    plain, without = model(images, times, condition)
    output, reports = model(images, times, condition, observe=True)
    np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-5)
    assert without.observed is None and isinstance(reports.observed, Observation)
    chex.assert_shape(reports.observed.trace.state, (2, 3, 2, 4, 16))  # [R, T, B, N, D]
    chex.assert_shape(reports.observed.trace.attention, (2, 3, 2, 4, 4 if index == 0 else 4 + 5))
    chex.assert_shape(reports.observed.trace.decoded, (2, 3, 2, 4, 4, 3))

    bias = model.final.out.bias[...]
    model.final.out.bias[...] = bias + 1  # the states are read by the final layer, and by nothing after it
    _, moved = model(images, times, condition, observe=True)
    np.testing.assert_allclose(moved.observed.trace.decoded, reports.observed.trace.decoded + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(moved.observed.trace.state, reports.observed.trace.state)
