"""Statistics of the gates at each latent step, in a form that can be averaged."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion.assignment import Assignment
from trm_diffusion.models.recursion.gate import Routing


class RoutingReport(NamedTuple):
    """What the gate did, averaged over all tokens; every array leads with the latent step, [T, ...] float32."""

    load: jax.Array  # [T, P, M] share of the selections that went to each expert
    importance: jax.Array  # [T, P, M] mean gate probability of each expert
    drop_fraction: jax.Array  # [T] share of the selections lost to capacity
    entropy: jax.Array  # [T] mean entropy of the gate, nats
    squared_logsumexp: jax.Array  # [T] mean of logsumexp(logits)^2, the router z-loss
    ran: jax.Array  # [T] 1 where this latent step ran, 0 where fewer were asked for or all tokens had stopped
    running: jax.Array  # [T] share of the tokens that had not stopped; 1 in the last entry
    halting_divergence: jax.Array  # [T] mean KL(p || prior) of the learned halting, in the last entry
    observed: Any = None  # what the latent steps do, if asked for: an `Observation` (recursion/observe.py)


def report_of(routing: Routing, assignment: Assignment, asking: jax.Array | None) -> RoutingReport:
    """The statistics of one latent step, without the leading axis. asking [B, N] bool: None is all tokens."""
    selected = assignment.selected.astype(jnp.float32)  # [G, S, P, M]
    wanted = jnp.maximum(jnp.sum(selected), 1.0)
    dispatched = jnp.sum(assignment.dispatched.astype(jnp.float32))
    choices = selected.shape[2]
    log_probabilities = jnp.log(jnp.maximum(routing.probabilities, 1e-30))
    running = jnp.ones(()) if asking is None else jnp.mean(asking.astype(jnp.float32))
    return RoutingReport(
        load=jnp.sum(selected, axis=(0, 1)) * choices / wanted,
        importance=jnp.mean(routing.probabilities, axis=(0, 1)),
        drop_fraction=(jnp.sum(selected) - dispatched) / wanted,
        entropy=-jnp.mean(jnp.sum(routing.probabilities * log_probabilities, axis=-1)),
        squared_logsumexp=jnp.mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))),
        ran=(running > 0).astype(jnp.float32),
        running=running,
        halting_divergence=jnp.zeros(()),
    )
