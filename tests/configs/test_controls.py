"""The controls differ in what they should and in nothing else; their cost is what paper and pencil give."""

import functools

import flax
import jax
import jax.numpy as jnp
import pytest

from benchmarks.controls import cost
from configs import controls
from configs.controls import ROWS
from trm_diffusion.analysis.flops import forward_flops
from trm_diffusion.config import resolve
from trm_diffusion.errors import UserError

# configs/digits.py: width, tokens, blocks, rank; patches of 2 x 2 pixels, 256 timestep frequencies
D, N, DEPTH, RANK, PATCH, FREQUENCIES = 96, 16, 4, 16, 4, 256
ATTENTION = 2 * 2 * N * N * D  # scores and weighted values, in all heads
BLOCK = 2 * D * 6 * D + 2 * N * D * 3 * D + ATTENTION + 2 * N * D * D + 2 * 2 * N * D * 4 * D
BASE = 2 * N * PATCH * D + 2 * (FREQUENCIES + D) * D + DEPTH * BLOCK + 2 * D * 2 * D + 2 * N * D * PATCH


def recursion_flops(steps, experts, rank):
    down_and_up = 2 * 2 * N * D * 3 * experts * rank
    gate = 2 * N * D * experts + 2 * D * experts
    weights = 2 * N * experts  # which of the experts the chosen one is
    return steps * (down_and_up + gate + weights) + (steps - 1) * ATTENTION


def experts_and_gate(experts, rank):
    return 6 * experts * rank * D + 2 * experts * D


EXPECTED = {  # row: trained parameters, forward FLOPs
    "base": (0, BASE),
    "sft": (D * 3 * D + 3 * D, BASE),
    "lora": (experts_and_gate(1, 2 * RANK), BASE + recursion_flops(1, 1, 2 * RANK)),
    "mixture": (experts_and_gate(2, RANK), BASE + recursion_flops(1, 2, RANK)),
    "recursion": (experts_and_gate(1, RANK), BASE + recursion_flops(2, 1, RANK)),
    "without_mod": (experts_and_gate(2, RANK), BASE + recursion_flops(2, 2, RANK)),
    "full": (experts_and_gate(2, RANK), BASE + recursion_flops(2, 2, RANK)),
}


@pytest.mark.parametrize("row", ROWS)
def test_cost_is_that_computed_by_hand(row):
    costs = cost(resolve(controls.get_config(f"base=digits,row={row}")))
    assert (costs["trained_parameters"], costs["forward_flops"]) == EXPECTED[row]


def test_rows_differ_in_what_they_name_alone():
    may_differ = {
        "base": {"model.recursion.blocks", "train.trainable", "init.missing"},
        "sft": {"model.recursion.blocks", "train.trainable", "init.missing", "model.scan_blocks"},
        "lora": {"model.recursion.latent_steps", "model.recursion.experts", "model.recursion.rank",
                 "model.recursion.normalization", "model.recursion.modulation"},
        "mixture": {"model.recursion.latent_steps"},
        "recursion": {"model.recursion.experts"},
        "without_mod": {"model.recursion.modulation"},
        "full": set(),
    }  # fmt: skip
    full = leaves(controls.get_config("row=full"))
    for row in ROWS:
        other = leaves(controls.get_config(f"row={row}"))
        assert {name for name in full if full[name] != other[name]} - {"name"} == may_differ[row]


def leaves(config):
    return {".".join(path): value for path, value in flax.traverse_util.flatten_dict(config.to_dict()).items()}


def test_refusals():
    with pytest.raises(UserError, match="row 'best' is none of base, sft"):
        controls.get_config("row=best")
    with pytest.raises(UserError, match="there is no other.py in configs/"):
        controls.get_config("base=other")


def test_flops_count_every_turn_of_a_loop_and_the_dearest_branch():
    square = jnp.zeros((4, 4))

    def twice(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x)

    assert forward_flops(twice, square) == 2 * 2 * 4**3
    assert (
        forward_flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], square) == 5 * 2 * 4**3
    )
    assert forward_flops(jax.jit(jax.checkpoint(lambda x: x @ x)), square) == 2 * 4**3
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=layout
    )
    assert forward_flops(convolve, image, kernel) == 2 * 64 * 5 * 27
    with pytest.raises(ValueError, match="while loop"):
        forward_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), square)
