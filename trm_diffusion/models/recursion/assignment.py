"""Which expert takes which token, within the experts' capacity.

Tokens are dispatched inside a *routing group*, the flat token list of a fixed number of images (paper, Figure 1). In
training each expert takes at most C = ceil(capacity_factor * k * tokens / M) tokens of a group; those with the highest
gate probability come first, ties by position (our reading). A token over capacity gets a zero update from that expert.
At inference no token is dropped.
"""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion.gate import Routing


class Assignment(NamedTuple):
    """Which expert takes which token, for G routing groups of S tokens each and C token slots in each expert."""

    combine: jax.Array  # [G, S, P, M] float32 weights, zero where a token is not dispatched
    selected: jax.Array  # [G, S, P, M] bool, what the gate selected
    dispatched: jax.Array  # [G, S, P, M] bool, what is left of it within the experts' capacity
    slot: jax.Array  # [G, S, P, k] int32, m * C + the token's position in expert m; M * C where it is not dispatched


def expert_capacity(tokens: int, experts: int, experts_per_token: int, capacity_factor: float) -> int:
    """C = ceil(capacity_factor * k * tokens / M), at most `tokens`."""
    # Exact, by the decimal that the factor is written as: 1.1 * 100 / 2 in floats is just above 55.
    factor = fractions.Fraction(str(float(capacity_factor)))
    return min(tokens, math.ceil(factor * experts_per_token * tokens / experts))


def assign(routing: Routing, group: int, capacity: int | None) -> Assignment:
    """Assigns tokens to experts. A routing group is `group` images; a capacity of None takes every token.

    An expert of -1 is none.
    """
    experts = routing.probabilities.shape[-1]
    one_hot = grouped(jax.nn.one_hot(routing.experts, experts, dtype=jnp.float32), group)  # [G, S, P, k, M]
    weights = jnp.einsum("gspk,gspkm->gspm", grouped(routing.weights, group), one_hot)
    dispatched = selected = jnp.any(one_hot > 0, axis=-2)
    slots = selected.shape[1] if capacity is None else min(capacity, selected.shape[1])  # of each expert
    if slots < selected.shape[1]:
        probabilities = jax.lax.stop_gradient(grouped(routing.probabilities, group))
        dispatched = selected & _within_capacity(jnp.where(selected, probabilities, -1.0), slots)
    first_slot = slots * jax.lax.broadcasted_iota(jnp.int32, dispatched.shape, 3)
    slot = jnp.where(dispatched, first_slot + position_in_expert(dispatched), experts * slots)
    slot = jnp.min(jnp.where(one_hot > 0, slot[..., None, :], experts * slots), axis=-1)
    return Assignment(jnp.where(dispatched, weights, 0.0), selected, dispatched, slot)


def position_in_expert(dispatched_gspm: jax.Array) -> jax.Array:
    """[G, S, P, M] int32: how many earlier tokens of the group are dispatched to the expert."""
    return jnp.cumsum(dispatched_gspm, axis=1, dtype=jnp.int32) - dispatched_gspm


def grouped(x: jax.Array, group: int) -> jax.Array:
    """[B, N, ...] -> [B / group, group * N, ...], the token list of each routing group."""
    return x.reshape(x.shape[0] // group, group * x.shape[1], *x.shape[2:])


def _within_capacity(priority_gspm: jax.Array, capacity: int) -> jax.Array:
    """[G, S, P, M] bool: whether a token is among the `capacity` tokens of highest priority; ties go to the earlier."""
    by_expert = jnp.moveaxis(priority_gspm, 1, -1)  # [G, P, M, S]
    # A sort, since `jax.lax.top_k` would gather the priorities of all devices on each.
    lowest = jnp.sort(by_expert, axis=-1)[..., -capacity]  # [G, P, M], the lowest priority that is dispatched
    above = priority_gspm > lowest[:, None]
    tied = priority_gspm == lowest[:, None]
    return above | (tied & (position_in_expert(tied) < capacity - jnp.sum(above, axis=1, keepdims=True)))
