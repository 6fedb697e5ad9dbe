"""docs/own_model.md: its code runs and does what the page says."""

import dataclasses
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trm_diffusion.models.recursion import RecursionConfig
from trm_diffusion.models.recursion.balance import auxiliary_loss

PAGE = (Path(__file__).parents[3] / "docs/own_model.md").read_text()
(CODE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BATCH, TOKENS, WIDTH, HEADS = 4, 6, 16, 2
CONFIG = RecursionConfig(latent_steps=3, experts=3, rank=4, routing_group=2)


def make_block(config=CONFIG):
    names = {}
    exec(CODE, names)  # noqa: S102  the code of our own page
    return names["MyBlock"](WIDTH, HEADS, config, nnx.Rngs(0))


def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    return jax.random.normal(keys[0], (BATCH, TOKENS, WIDTH)), *(jax.random.normal(k, (BATCH, WIDTH)) for k in keys[1:])


def test_it_has_at_most_30_lines():
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 30


# The page's code relies on implicit broadcasting, which the other tests forbid.
@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fields", [{}, dict(pool="per_latent_step"), dict(halting="learned")], ids=str)
def test_it_starts_from_the_base_at_every_depth(fields, training):
    config = dataclasses.replace(CONFIG, **fields)
    block, (x, timestep, label) = make_block(config), inputs()
    key = jax.random.key(2) if training else None
    shift, scale, gate = jnp.split(block.modulation(nnx.silu(timestep + label)), 3, axis=-1)
    normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    attention = block.attention
    modulated = normal * (1 + scale[:, None]) + shift[:, None]
    base = x + gate[:, None] * attention.out(attention.attend(attention.project(modulated)))
    assert np.abs(base - x).max() > 0.01
    for steps in (1, 2, 3):
        out, report = block(x, timestep, label, steps, key)
        np.testing.assert_allclose(out, base, rtol=1e-5, atol=1e-5)
        assert report.load.shape == (steps, 1, config.experts)
    block.recursion.pool.experts.up[...] += 0.5
    assert np.abs(block(x, timestep, label, None, key)[0] - base).max() > 1e-3


def test_it_trains_under_jit_and_its_report_is_a_loss():
    config = dataclasses.replace(CONFIG, switch_loss_weight=0.1)
    graphdef, state = nnx.split(make_block(config))

    @jax.jit
    @jax.grad
    def gradients(state):
        out, report = nnx.merge(graphdef, state)(*inputs(), key=jax.random.key(3))
        reports = jax.tree.map(lambda leaf: leaf[None], report)
        return jnp.mean(jnp.square(out)) + auxiliary_loss(reports, config)

    found = dict(nnx.to_flat_state(gradients(state)))
    chex.assert_tree_all_finite(list(map(nnx.as_pure, found.values())))
    for path in (("recursion", "pool", "experts", "up"), ("recursion", "pool", "gate", "token_kernel")):
        assert np.any(np.asarray(found[path][...]) != 0)


def test_what_the_page_calls_an_error_is_one():
    block = make_block(dataclasses.replace(CONFIG, pool="per_latent_step"))
    for steps in (0, -1, 1.5, 4):
        with pytest.raises(ValueError, match="^latent_steps is"):
            block(*inputs(), steps)
    odd = [leaf[:3] for leaf in inputs()]
    with pytest.raises(ValueError, match="does not divide into routing groups"):
        block(*odd, key=jax.random.key(0))
    out, _ = jax.jit(lambda steps: block(*inputs(), steps))(jnp.asarray(4))
    assert np.isnan(out).all()
