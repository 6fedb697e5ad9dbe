"""Liveness: what each latent step does to the state, measured in a forward pass of its own.

A recursion can run and do nothing: its state may reach its fixed point after one latent step, or its updates may be too
small beside the base's. Norms are those of whole batches, sqrt(sum x^2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Trace(NamedTuple):
    """What one latent step computed."""

    update: jax.Array  # [B, N, 3, H, d], the experts'
    qkv: jax.Array  # [B, N, 3, H, d], as they are attended with
    state: jax.Array  # [B, N, D] a_t; in the last latent step a_{T-1}


class Liveness(NamedTuple):
    """By latent step, [T] float32. The last latent step has no new state; its attention is the block's own."""

    change: jax.Array  # ||a_t - a_{t-1}|| / ||a_{t-1}||
    drift: jax.Array  # ||a_t - a_0|| / ||a_0||
    entropy: jax.Array  # mean entropy of the attention over the logarithm of its length: 1 is uniform
    update: jax.Array  # norm of the experts' update over that of the base's q, k, v of x~


def liveness_of(trace: Trace, ran: jax.Array, x_bnd: jax.Array, attention: Any, context: Any) -> Liveness:
    """The liveness of all latent steps; those that did not run (ran [T]) have 0.

    trace: with a leading axis [T]. x_bnd: x~, which is a_0. attention, context: as `Recursion.__call__` takes them.
    """
    before = jnp.concatenate([x_bnd[None], trace.state[:-1]])
    moved = (ran > 0) & (jnp.arange(len(ran)) < len(ran) - 1)
    return Liveness(
        change=jnp.where(moved, _norms(trace.state - before) / _norms(before), 0.0),
        drift=jnp.where(ran > 0, _norms(trace.state - x_bnd[None]) / _norms(x_bnd[None]), 0.0),
        entropy=ran * jnp.stack([attention.entropy(qkv, context) for qkv in trace.qkv]),
        update=_norms(trace.update) / _norms(attention.project(x_bnd)[None]),
    )


def _norms(x: jax.Array) -> jax.Array:
    """[T, ...] -> [T] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))
