"""What each latent step does, observed in a forward pass of its own: its liveness in numbers, and a trace to look at.

A recursion can run and do nothing: its state may reach its fixed point after one latent step, or its updates may be too
small beside the base's. Norms are those of whole batches, sqrt(sum x^2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion.report import RoutingReport


class Observed(NamedTuple):
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


class Trace(NamedTuple):
    """Arrays of a whole batch, by latent step; 0 for one that did not run."""

    state: jax.Array  # [T, B, N, D] a_{t-1}, which latent step t refines; the first is x~
    attention: jax.Array  # [T, B, N, M] mean over heads, float32; the last is the block's own
    decoded: jax.Array | None = None  # [T, B, H, W, C'] what the model's final layer makes of `state`, float32


class Observation(NamedTuple):
    liveness: Liveness
    trace: Trace


def summarized(report: RoutingReport, x_bnd: jax.Array, attention: Any, context: Any) -> RoutingReport:
    """The report with an `Observation` in the place of what was `Observed` in each of the T latent steps.

    x_bnd: x~, which is a_0. attention, context: as `Recursion.__call__` takes them.
    """
    seen, ran = report.observed, report.ran
    before = jnp.concatenate([x_bnd[None], seen.state[:-1]])
    before = before.at[-1].set(seen.state[-1])  # also if the latent steps before the last did not run
    weights = jnp.stack([attention.weights(qkv, context) for qkv in seen.qkv])
    trace = Trace(*(jnp.where(ran.reshape(-1, 1, 1, 1) > 0, leaf, 0) for leaf in (before, weights)))
    return report._replace(observed=Observation(_liveness(seen, before, ran, x_bnd, attention, context), trace))


def _liveness(seen: Observed, before: jax.Array, ran: jax.Array, x_bnd, attention, context) -> Liveness:
    """The liveness of all latent steps; those that did not run (ran [T]) have 0. before: [T, B, N, D], a_{t-1}."""
    moved = (ran > 0) & (jnp.arange(len(ran)) < len(ran) - 1)
    return Liveness(
        change=jnp.where(moved, _norms(seen.state - before) / _norms(before), 0.0),
        drift=jnp.where(ran > 0, _norms(seen.state - x_bnd[None]) / _norms(x_bnd[None]), 0.0),
        entropy=ran * jnp.stack([attention.entropy(qkv, context) for qkv in seen.qkv]),
        update=_norms(seen.update) / _norms(attention.project(x_bnd)[None]),
    )


def _norms(x: jax.Array) -> jax.Array:
    """[T, ...] -> [T] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))
