"""A loop over whole blocks equals the deeper model that repeats their weights, in values and FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jobs.tiny import text_config, tiny_config
from trm_diffusion.analysis.flops import forward_flops
from trm_diffusion.config import Config
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.models.architecture import make_network, stack_layout
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.stack import from_per_layer, per_layer
from trm_diffusion.runtime.parameters import PureModel

TINY = {
    "dit": tiny_config,
    "mmdit": text_config,
}
LOOP = dict(looped=True, blocks="1,2", latent_steps=3)


def model_of(config: Config, recursion: RecursionConfig, depth: int) -> tuple[PureModel, dict]:
    """The network, and how its blocks are stored."""
    config = dataclasses.replace(config.model, recursion=recursion, depth=depth)
    sizes = dict(image_size=8, in_channels=1, out_channels=1, num_classes=10)
    return PureModel(lambda key: make_network(config, rngs=nnx.Rngs(key), **sizes)), stack_layout(config)


def data(architecture: str):
    rng = np.random.default_rng(0)
    condition = jnp.array([3, 4]) if architecture == "dit" else jnp.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    return jnp.asarray(rng.standard_normal((2, 8, 8, 1)), jnp.float32), jnp.array([10.0, 700.0]), condition


def looped_and_unrolled(architecture: str, turns: int):
    """A model of 4 blocks whose middle two are in the loop, and one of 2 + 2 T blocks; each with its parameters."""
    config = TINY[architecture](model__width=8)
    looped, layout = model_of(config, RecursionConfig(**LOOP), 4)
    deeper, deep_layout = model_of(config, RecursionConfig(), 2 + 2 * turns)
    rng = np.random.default_rng(1)
    parameters = {
        name: jnp.asarray(0.3 * rng.standard_normal(shape.shape), jnp.float32) for name, shape in looped.shapes.items()
    }
    layers, order = per_layer(parameters, layout), [0, *[1, 2] * turns, 3]
    repeated = {name: value for name, value in layers.items() if "stack/blocks/" not in name}
    for name, value in layers.items():
        before, blocks, rest = name.partition("stack/blocks/")
        for new, old in enumerate(order):
            if blocks and rest.split("/")[0] == str(old):
                repeated[f"{before}{blocks}{new}/{rest.partition('/')[2]}"] = value
    return (looped, parameters), (deeper, from_per_layer(repeated, list(deeper.shapes), deep_layout))


@pytest.mark.parametrize("architecture", TINY)
def test_t_loops_are_the_model_that_repeats_the_blocks(architecture):
    inputs, turns = data(architecture), 3
    (looped, parameters), (deeper, repeated) = looped_and_unrolled(architecture, turns)

    def run(parameters, steps):
        return looped.bind(parameters)(*inputs, latent_steps=steps)[0]

    expected = jax.jit(lambda parameters: deeper.bind(parameters)(*inputs)[0])(repeated)
    by_number, traced = jax.jit(run, static_argnums=1), jax.jit(run)
    scale = dict(rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(by_number(parameters, turns), expected, **scale)
    np.testing.assert_allclose(traced(parameters, jnp.asarray(turns)), expected, **scale)
    assert np.abs(traced(parameters, jnp.asarray(1)) - expected).max() > 100 * scale["atol"]
    assert np.isnan(traced(parameters, jnp.asarray(4))).all() and np.isnan(traced(parameters, jnp.asarray(0))).all()


@pytest.mark.parametrize("architecture", TINY)
def test_flops_are_those_of_the_deeper_model(architecture):
    """Above the T of the config, too."""
    inputs, turns = data(architecture), 5
    (looped, parameters), (deeper, repeated) = looped_and_unrolled(architecture, turns)
    flops = forward_flops(lambda p: looped.bind(p)(*inputs, latent_steps=turns)[0], parameters)
    assert flops == forward_flops(lambda p: deeper.bind(p)(*inputs)[0], repeated)


def test_it_trains_at_a_drawn_depth_and_adds_no_parameters():
    fields = dict(model__depth=3, model__recursion__latent_steps=3, train__latent_steps=(1, 3))
    looped = build(tiny_config(model__recursion__looped=True, **fields))
    plain = build(tiny_config(model__recursion__blocks="none", model__depth=3))
    count = {name: shape.size for name, shape in looped.model.shapes.items()}
    assert sum(count.values()) == sum(shape.size for shape in plain.model.shapes.values())
    jax.eval_shape(make_train_step(looped), looped.abstract_state, looped.abstract_batch(8))


def test_what_a_loop_cannot_be_is_refused():
    with pytest.raises(UserError, match=r'^config.model.recursion.blocks: "0,2" has gaps; the blocks of a loop'):
        tiny_config(model__depth=3, model__recursion__blocks="0,2", model__recursion__looped=True)
    with pytest.raises(UserError, match="halting is 'convergence'; with looped there is none"):
        tiny_config(model__recursion__looped=True, model__recursion__halting="convergence")
