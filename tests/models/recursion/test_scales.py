"""What docs/mechanism.md says of the paper's form where B is small: each statement is a power of B's scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.recursion.small import SMALL, as_reference, build, inputs, run, run_reference

SCALES = (4e-3, 2e-3)  # of B
STEPS = 4


def power(values) -> float:
    """The exponent p of values ~ scale^p, from the two scales."""
    larger, smaller = values
    return np.log(larger / smaller) / np.log(SCALES[0] / SCALES[1])


def at_scale(scale, *, joint):
    """The final q, k and v at T = 0 (without experts), 1, .., STEPS, and the states a_0, .., by the plain reference."""
    config = dataclasses.replace(SMALL, latent_steps=STEPS)
    graphdef, state = build(config)
    arguments = as_reference(graphdef, state, inputs(), joint=joint)
    pools = [{name: scale * leaf if name == "up" else leaf for name, leaf in arguments["pools"][0].items()}]
    results = [run_reference(arguments | {"pools": pools}, config, steps=steps) for steps in range(1, STEPS + 1)]
    none = run_reference(arguments | {"pools": [pools[0] | {"up": 0 * pools[0]["up"]}]}, config, steps=1)
    states = [arguments["x"], *(after for _, after in results[-1].trajectory)]
    return [none.qkv, *(result.qkv for result in results)], states


@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
def test_powers_of_each_latent_step(joint):
    """Experts change q, k, v at first order, and each further latent step by an order less.

    In joint attention the text's values move the state at order zero, once, so all orders after the first are one less.
    """
    found = [at_scale(scale, joint=joint) for scale in SCALES]
    outputs, states = ([[np.linalg.norm(b - a) for a, b in zip(one[:-1], one[1:], strict=True)] for one in both]
                       for both in zip(*found, strict=True))  # fmt: skip
    changes = [power(pair) for pair in zip(*outputs, strict=True)]
    np.testing.assert_allclose(changes, [1, 1, 2, 3] if joint else [1, 2, 3, 4], atol=0.1)
    moves = [power(pair) for pair in zip(*states, strict=True)]
    np.testing.assert_allclose(moves, [0, 1, 2] if joint else [1, 2, 3], atol=0.1)


def test_powers_of_the_gradients_through_intermediate_latent_steps():
    """Relative to that through the last latent step: first order through v, third through q and k."""
    config = dataclasses.replace(
        SMALL, latent_steps=2, pool="per_latent_step"
    )  # a pool's gradient is its latent step's
    graphdef, state = build(config)
    data = inputs()

    @jax.jit
    def norms(scale):
        flat = nnx.to_flat_state(state)
        scaled = nnx.from_flat_state({path: scale * v[...] if path[-1] == "up" else v[...] for path, v in flat})
        gradient = jax.grad(lambda state: jnp.sum(jnp.sin(run(graphdef, state, data, steps=2)[0])))(scaled)
        of = {path[-1]: v[...] for path, v in nnx.to_flat_state(gradient)}
        return {name: jnp.linalg.norm(of[name].reshape(2, 3, -1), axis=-1) for name in ("up", "down")}  # [T, q k v]

    found = [jax.tree.map(np.asarray, norms(scale)) for scale in (0.1, 0.05)]
    for name in ("up", "down"):  # B and A
        relative = [one[name][0] / np.linalg.norm(one[name][1]) for one in found]
        np.testing.assert_allclose(np.log2(relative[0] / relative[1]), [3, 3, 1], atol=0.25)
