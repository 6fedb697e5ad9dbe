"""The gate: its selection and weights, its precision, and the gradient that it gets from the task loss."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from tests.models.recursion.small import SMALL, build, inputs, run, with_zero_up
from trm_diffusion.models.recursion.gate import Conditioning, Gate

WIDTH, EXPERTS = 8, 5


def make_gate(*, experts=EXPERTS, scale=50.0, **options) -> Gate:
    """A gate with kernels of fifty times their initial size, so that tokens prefer different experts."""
    gate = Gate(WIDTH, experts, rngs=nnx.Rngs(0), **options)
    gate.token_kernel[...] *= scale
    gate.condition_kernel[...] *= scale
    return gate


def tokens(images=2, count=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 3)
    timestep, condition = (jax.random.normal(key, (images, WIDTH), dtype) for key in keys[1:])
    return jax.random.normal(keys[0], (images, count, WIDTH), dtype), Conditioning(timestep, condition)


class SelectionTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(k=(1, 2), forward_weight=("straight_through", "soft"), training=(True, False))
    def test_the_k_highest_scores_with_their_weights(self, k, forward_weight, training):
        gate = make_gate(experts_per_token=k, forward_weight=forward_weight, temperature=5.0)
        key = jax.random.key(3) if training else None
        routing = self.variant(lambda h, conditioning: gate(h, conditioning, key))(*tokens())
        chex.assert_type([routing.experts, routing.weights], [jnp.int32, jnp.float32])
        noise = np.asarray(jax.random.gumbel(key, routing.logits.shape)) if training else 0.0
        z = (np.asarray(routing.logits, np.float64) + noise) / 5.0
        expected = np.argsort(-z, axis=-1)[..., :k]
        np.testing.assert_array_equal(routing.experts, expected)
        probabilities = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        np.testing.assert_allclose(routing.probabilities, probabilities, rtol=1e-5)
        weights = np.take_along_axis(probabilities, expected, -1)
        if forward_weight == "straight_through":
            weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(routing.weights, weights, rtol=1e-5)
        if k == 1 and forward_weight == "straight_through":
            np.testing.assert_array_equal(routing.weights, 1.0)


def test_noise_selects_each_expert_as_often_as_its_softmax_says():
    """The maximum of logits plus Gumbel noise is a draw from softmax(logits), whatever the temperature."""
    gate, (h, conditioning) = make_gate(scale=20.0), tokens(images=1, count=1)
    many = 20_000
    routing = gate(jnp.broadcast_to(h, (1, many, WIDTH)), conditioning, jax.random.key(0))
    frequencies = np.bincount(np.asarray(routing.experts).ravel(), minlength=EXPERTS) / many
    chances = np.asarray(jax.nn.softmax(routing.logits[0, 0, 0]))
    assert chances.max() - chances.min() > 0.1
    np.testing.assert_allclose(frequencies, chances, atol=4 * 0.5 / many**0.5)


@pytest.mark.parametrize("k", [1, 2])
def test_straight_through_has_the_gradient_of_the_soft_weights(k):
    """d w_j / d logits_m = p_j (delta_jm - p_m) / tau under both forms, whatever the forward value."""
    logits = jax.random.normal(jax.random.key(0), (2, 6, 1, EXPERTS))

    def weights(forward_weight, logits):
        gate = Gate(WIDTH, EXPERTS, experts_per_token=k, forward_weight=forward_weight, rngs=nnx.Rngs(0))
        gate.logits = lambda h, conditioning: logits
        return gate(*tokens(), jax.random.key(2))

    routing = weights("soft", logits)
    cotangent = jax.random.normal(jax.random.key(4), routing.weights.shape)
    p, g = np.asarray(routing.probabilities), np.zeros(routing.probabilities.shape)
    np.put_along_axis(g, np.asarray(routing.experts), np.asarray(cotangent), axis=-1)
    expected = (p * g - p * (p * g).sum(-1, keepdims=True)) / 5.0
    for form in ("soft", "straight_through"):
        _, backward = jax.vjp(lambda logits, form=form: weights(form, logits).weights, logits)
        np.testing.assert_allclose(backward(cotangent)[0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("forward_weight", ["straight_through", "soft"])
def test_a_balance_bias_may_select_an_expert_whose_probability_underflows(k, forward_weight):
    """Its weight is finite, and with straight_through the renormalised one of exp(z), which is 1 for k = 1."""
    options = dict(experts_per_token=k, temperature=1.0, forward_weight=forward_weight)
    gate, (h, conditioning) = make_gate(balance_bias=True, **options), tokens()
    gate.balance_bias[...] = jnp.asarray([[0, 0, 0, 1000.0, 1000.0]])
    logits = jnp.broadcast_to(jnp.asarray([400.0, 0, 0, 1.0, 2.0]), (2, 6, 1, EXPERTS))
    gate.logits = lambda h, conditioning: logits
    routing = gate(h, conditioning, None)
    np.testing.assert_array_equal(routing.experts, np.broadcast_to([4, 3][:k], (2, 6, 1, k)))
    share = np.exp([0.0, -1.0][:k]) / np.exp([0.0, -1.0][:k]).sum()
    expected = share if forward_weight == "straight_through" else np.zeros(k)
    np.testing.assert_allclose(routing.weights, np.broadcast_to(expected, (2, 6, 1, k)), rtol=1e-6)


def test_the_gate_computes_in_float32_from_bfloat16_tokens():
    """It selects the same experts as float64; logits rounded to bfloat16 would select others."""
    gate = make_gate(experts=16)
    h, conditioning = tokens(images=4, count=256, dtype=jnp.bfloat16)
    routing = gate(h, conditioning, None)
    chex.assert_type([routing.logits, routing.probabilities, routing.weights], jnp.float32)
    h64, timestep, condition = (np.asarray(a, np.float64) for a in (h, *conditioning))
    normed = (h64 - h64.mean(-1, keepdims=True)) / np.sqrt(h64.var(-1, keepdims=True) + 1e-6)
    kernels = (np.asarray(kernel[...], np.float64)[:, 0] for kernel in (gate.token_kernel, gate.condition_kernel))
    exact = normed @ next(kernels) + ((timestep + condition) @ next(kernels))[:, None]
    np.testing.assert_allclose(routing.logits[:, :, 0], exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(routing.experts[:, :, 0, 0], exact.argmax(-1))
    assert np.any(np.asarray(routing.logits.astype(jnp.bfloat16)).argmax(-1)[:, :, 0] != exact.argmax(-1))


def test_a_recursion_in_bfloat16_keeps_its_gate_in_float32():
    """For a timestep and a condition that bfloat16 holds exactly, its report equals that of a float32 recursion."""
    config = dataclasses.replace(SMALL, experts=3, latent_steps=1, gate_inputs="timestep,condition")
    data = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), inputs())
    reports = []
    for dtype in (jnp.bfloat16, jnp.float32):
        graphdef, state = build(config, dtype=dtype)
        qkv, report = run(graphdef, state, jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), data), steps=1)
        assert qkv.dtype == dtype
        chex.assert_type(jax.tree.leaves(report), jnp.float32)
        reports.append(report)
    chex.assert_trees_all_close(*reports, rtol=1e-6)


def gate_gradients(config, state, graphdef, data, *, key):
    """Gradients of the gate's kernels under a loss of q, k and v, before and after one update of B only."""

    @jax.jit
    def gradient(state):
        def loss(state):
            return jnp.mean(jnp.square(run(graphdef, state, data, steps=config.latent_steps, key=key)[0] - 1.0))

        return jax.grad(loss)(state)

    def gates(gradients):
        return [v[...] for path, v in nnx.to_flat_state(gradients) if "gate" in path]

    before = gradient(state)
    steps = {path: v[...] for path, v in nnx.to_flat_state(before)}
    moved = nnx.from_flat_state(
        {path: v - 0.1 * steps[path] if path[-1] == "up" else v for path, v in nnx.to_flat_state(state)}
    )
    return gates(before), gates(gradient(moved))


@pytest.mark.parametrize("balanced", [False, True], ids=["random", "balanced"])
@pytest.mark.parametrize("forward_weight", ["straight_through", "soft"])
@pytest.mark.parametrize("experts, k", [(1, 1), (2, 1), (5, 2)])
def test_the_task_loss_trains_the_gate_as_soon_as_the_experts_differ_from_zero(experts, k, forward_weight, balanced):
    """With B = 0 all experts are equal and the gradient is exactly zero. From B's first update on it is not.

    This also holds at perfect balance: a gate of zeros, with all probabilities 1 / M (here at inference, without
    noise). The weight of a single expert is always 1, so its gate never gets a gradient, in either form.
    """
    config = dataclasses.replace(SMALL, experts=experts, experts_per_token=k, forward_weight=forward_weight)
    graphdef, state = build(config)
    if balanced:
        flat = nnx.to_flat_state(state)
        state = nnx.from_flat_state({path: 0 * v if "gate" in path else v for path, v in flat})
    key = None if balanced else jax.random.key(2)
    before, after = gate_gradients(config, with_zero_up(state), graphdef, inputs(), key=key)
    assert len(before) == 2
    for gradient in before:
        np.testing.assert_array_equal(gradient, 0.0)
    chex.assert_tree_all_finite(after)
    for gradient in after:
        assert np.any(gradient != 0) == (experts > 1)
