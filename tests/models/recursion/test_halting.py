"""Halting: both rules over many latent steps against plain loops, frozen tokens, and early exit."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.recursion import reference
from tests.models.recursion.small import IMAGES, SMALL, TOKENS, WIDTH, as_reference, build, inputs, run, run_reference
from trm_diffusion.models.recursion.halting import Halting

STEPS = 6
RULES = {
    "convergence": dict(halting="convergence", halting_epsilon=0.6),
    "patient": dict(halting="convergence", halting_epsilon=0.6, halting_patience=2),
    "learned": dict(halting="learned"),
}


def configured(rule: str, **fields):
    return dataclasses.replace(SMALL, **dict(latent_steps=STEPS, experts=3) | RULES[rule] | fields)


def test_a_patient_token_runs_longer():
    shares, data = {}, inputs()
    for rule in RULES:
        config = configured(rule)
        graphdef, state = build(config)
        arguments = as_reference(graphdef, state, data, joint=True)
        shares[rule] = run_reference(arguments, config, steps=STEPS).running[:-1]
        # Some stop and some go on, the same ones as in the plain loop.
        assert any(0 < share < 1 for share in shares[rule])
        _, report = jax.jit(lambda s, g=graphdef: run(g, s, data, joint=True, steps=STEPS))(state)
        np.testing.assert_allclose(report.running[:-1], shares[rule], rtol=1e-6)
    assert shares["patient"][1] == 1.0 and sum(shares["patient"]) > sum(shares["convergence"])


@pytest.mark.parametrize("training", [False, True])
def test_a_stopped_token_is_frozen_and_asks_for_nothing(training):
    """Once all have stopped, more latent steps change nothing, and they do not count as run."""
    config = configured("convergence", halting_epsilon=1e6, pool="shared", capacity_factor=100.0)
    graphdef, state = build(config)
    key = jax.random.key(0) if training else None
    at_depth = jax.jit(lambda state, steps: run(graphdef, state, inputs(), steps=steps, key=key))
    qkv, _ = at_depth(state, 2)
    longer, long_report = at_depth(state, STEPS)
    np.testing.assert_array_equal(long_report.running, [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(long_report.ran, [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(long_report.load[1:-1], 0.0)
    if not training:  # in training the last latent step's noise depends on its number
        np.testing.assert_array_equal(longer, qkv)


@pytest.mark.parametrize("rule", RULES)
def test_leaving_early_equals_running_every_latent_step(rule):
    """Images whose tokens have all stopped, beside one that goes on, end as they do with early exit."""
    config = configured(rule)
    graphdef, state = build(config)
    data = inputs()
    forward = jax.jit(lambda data: run(graphdef, state, data, joint=True, steps=STEPS))
    together, together_report = forward(data)
    fewer = 0
    for image in range(IMAGES):
        alone, report = forward(jax.tree.map(lambda leaf, i=image: jnp.stack([leaf[i]] * IMAGES), data))
        np.testing.assert_allclose(alone[0], together[image], rtol=1e-5, atol=1e-5)
        fewer += report.ran.sum() < together_report.ran.sum()
    assert fewer


def test_learned_training_takes_the_expected_state_and_its_divergence():
    graphdef, halting = nnx.split(Halting(WIDTH, "learned", epsilon=0, patience=1, prior=0.3, rngs=nnx.Rngs(0)))
    config = configured("learned")
    states = jax.random.normal(jax.random.key(0), (4, IMAGES, TOKENS, WIDTH))

    @jax.jit
    def through(parameters, states):
        rule = nnx.merge(graphdef, parameters)
        progress = rule.start(states[0], len(states), training=True)
        for t in range(1, len(states)):
            progress = rule.advance(progress, states[t - 1], states[t], t, len(states), training=True)
        return progress

    flat = {path: jnp.full(v.shape, 0.2 if path[-1] == "kernel" else -0.4) for path, v in nnx.to_flat_state(halting)}
    progress = through(nnx.from_flat_state(flat), states)
    head = np.full(WIDTH, 0.2), -0.4
    for b, n in np.ndindex(IMAGES, TOKENS):
        state, divergence = reference.expected_state(list(np.asarray(states[:, b, n], np.float64)), config, head)
        np.testing.assert_allclose(progress.expected[b, n], state, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(progress.divergence[b, n], divergence, rtol=1e-4, atol=1e-6)
    chex.assert_tree_all_finite(progress)
    assert np.all(progress.running) and np.all(progress.survival == 0)

    # A head that always stops with the prior's chance has zero divergence from it.
    prior = {p: jnp.full(v.shape, 0.0 if p[-1] == "kernel" else np.log(0.3 / 0.7)) for p, v in flat.items()}
    np.testing.assert_allclose(through(nnx.from_flat_state(prior), states).divergence, 0.0, atol=1e-6)


@pytest.mark.parametrize("truncated", [0, 1, 2])
def test_the_halting_head_is_trained_by_the_loss_and_the_prior(truncated):
    """Also where no latent step passes a gradient: an untrained head stops every token at once when sampling."""
    config = configured("learned", latent_steps=3, truncated_latent_steps=truncated)
    graphdef, state = build(config)

    def loss(state, weight):
        qkv, report = run(graphdef, state, inputs(), steps=3, key=jax.random.key(1))
        return jnp.sum(jnp.sin(qkv)) + weight * report.halting_divergence[-1]

    gradient = jax.jit(jax.grad(loss))
    task, both = ({p: np.asarray(v[...]) for p, v in nnx.to_flat_state(gradient(state, w))} for w in (0.0, 1.0))
    for path in task:
        assert np.all(np.isfinite(both[path]))
        if "halting" in path:
            assert np.any(task[path] != 0) and np.any(both[path] != task[path])


def test_a_token_that_stops_at_once_shows_the_others_its_first_keys_and_values():
    """With T = 2 the tokens that go on end as they do without halting; the others end with a_0 = x~."""
    config = configured("learned", latent_steps=2)
    graphdef, state = build(config)
    arguments = as_reference(graphdef, state, data := inputs(), joint=False)
    stops = np.array([[reference.has_stopped([a], config, arguments["head"]) for a in image] for image in data[0]])
    assert stops.any() and not stops.all()
    found, report = jax.jit(lambda: run(graphdef, state, data, steps=2))()
    plain, _ = build(dataclasses.replace(config, halting="none"))
    weights = nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(state) if "halting" not in p])
    every, _ = jax.jit(lambda: run(plain, weights, data, steps=2))()
    np.testing.assert_allclose(found[~stops], every[~stops], rtol=1e-5, atol=1e-5)
    assert np.abs(found[stops] - every[stops]).max() > 1e-3
    np.testing.assert_allclose(report.running, [1 - stops.mean(), 1.0], rtol=1e-6)
    np.testing.assert_allclose(report.load.sum(-1), 1.0, rtol=1e-6)
