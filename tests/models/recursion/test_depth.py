"""Depths out of range are refused, or give NaN."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.recursion.small import SMALL, build, inputs, run

FORMS = {
    "plain": dict(),
    "capacity": dict(dispatch="capacity", capacity_factor=0.5, experts=3),
    "pools": dict(pool="per_latent_step"),
    "gate_of_tokens": dict(gate_inputs="tokens", modulation=False, normalization=False),
    "convergence": dict(halting="convergence", halting_epsilon=0.6),
    "learned": dict(halting="learned"),
}


def configured(form="plain"):
    return dataclasses.replace(SMALL, latent_steps=3, **FORMS[form])


@pytest.mark.parametrize(("form", "steps", "message"), [
    ("plain", 0, "^latent_steps is 0; it must be at least 1$"),
    ("plain", -2, "^latent_steps is -2; it must be at least 1$"),
    ("plain", np.int32(0), "at least 1$"),
    ("plain", 2.0, "^latent_steps is 2.0; give an integer$"),
    ("plain", "2", "give an integer$"),
    ("plain", jnp.asarray(4), r"^latent_steps is 4; an array must be in 1 .. 3$"),
    ("plain", jnp.asarray(0), r"in 1 .. 3$"),
    ("plain", jnp.asarray(2.0), r"^latent_steps is float32\[\]; give an integer scalar$"),
    ("plain", jnp.asarray([1, 2]), r"^latent_steps is int32\[2\]; give an integer scalar$"),
    ("pools", 4, "^latent_steps is 4; pool per_latent_step has 3 pools, one for each$"),
])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_a_known_depth_that_cannot_be_is_refused(form, steps, message, training):
    graphdef, state = build(configured(form))
    with pytest.raises(ValueError, match=message):
        run(graphdef, state, inputs(), steps=steps, key=jax.random.key(0) if training else None)


def test_a_config_without_latent_steps_is_refused():
    with pytest.raises(ValueError, match="latent_steps is 0"):
        dataclasses.replace(SMALL, latent_steps=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_traced_depth_out_of_range_gives_no_number(form, training):
    """Its loss is NaN, so that nobody can mistake it for a result; a depth in range gives finite numbers."""
    config = configured(form)
    graphdef, state = build(config)
    key = jax.random.key(3) if training else None
    at_depth = jax.jit(lambda state, steps: run(graphdef, state, inputs(), joint=True, steps=steps, key=key)[0])
    for steps in (-1, 0, config.latent_steps + 1, config.latent_steps + 7):
        qkv = at_depth(state, jnp.asarray(steps))
        # In training, tokens over capacity have no update; the NaN of the others makes the loss NaN.
        assert np.isnan(np.mean(qkv)) if training else np.isnan(qkv).all()
    for steps in range(1, config.latent_steps + 1):
        chex.assert_tree_all_finite(at_depth(state, jnp.asarray(steps)))


def test_a_shared_pool_serves_more_latent_steps_than_the_config_names():
    graphdef, state = build(configured())
    qkv, report = run(graphdef, state, inputs(), steps=np.int64(5))
    chex.assert_tree_all_finite(qkv)
    assert report.ran.tolist() == [1] * 5


def test_an_array_that_is_known_while_tracing_is_a_depth_too():
    graphdef, state = build(configured())
    expected, _ = run(graphdef, state, inputs(), steps=2)
    known = jnp.asarray(2)
    found = jax.jit(lambda: run(graphdef, state, inputs(), steps=known)[0])()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
