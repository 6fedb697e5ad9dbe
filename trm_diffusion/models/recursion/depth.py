"""Depth: how many latent steps there are, and three ways to run the T - 1 intermediate ones.

    scan        one after another in one `jax.lax.scan`, or unrolled
    truncated   a scan whose first latent steps pass no gradient, except to the head of learned halting
    early exit  a `jax.lax.while_loop` that ends as soon as no token of the batch runs any more (inference with halting)

T is an int or a traced scalar. With a traced scalar one program serves every depth up to the config's: it has as many
latent steps as the config names, and skips those past T.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.models.remat import rematerialized

Step = Callable  # (state, t from 0, truncated=False) -> (state, RoutingReport); truncated: it passes no gradient


def checked(latent_steps: int | jax.Array | None, config: RecursionConfig) -> int | jax.Array:
    """T; None is the config's. Raises ValueError for a T that is out of range, if its value is known while tracing."""
    if latent_steps is None:
        latent_steps = config.latent_steps
    if isinstance(latent_steps, jax.Array):
        if latent_steps.ndim or not jnp.issubdtype(latent_steps.dtype, jnp.integer):
            raise ValueError(f"latent_steps is {latent_steps.dtype}{list(latent_steps.shape)}; give an integer scalar")
        if not isinstance(latent_steps, jax.core.Tracer) and not 1 <= int(latent_steps) <= config.latent_steps:
            raise ValueError(f"latent_steps is {latent_steps}; an array must be in 1 .. {config.latent_steps}")
        return latent_steps
    try:
        steps = operator.index(latent_steps)
    except TypeError:
        raise ValueError(f"latent_steps is {latent_steps!r}; give an integer") from None
    if steps < 1:
        raise ValueError(f"latent_steps is {steps}; it must be at least 1")
    if config.pool == "per_latent_step" and steps > config.latent_steps:
        raise ValueError(f"latent_steps is {steps}; pool per_latent_step has {config.latent_steps} pools, one for each")
    return steps


def in_range(latent_steps: int | jax.Array, config: RecursionConfig) -> jax.Array | None:
    """Whether a traced T is in 1 .. config.latent_steps, bool []; None for an int, which is checked while tracing."""
    if isinstance(latent_steps, int):
        return None
    return (latent_steps >= 1) & (latent_steps <= config.latent_steps)


def truncates(latent_steps: int | jax.Array, config: RecursionConfig) -> bool:
    """Whether a_0, and the states of the first latent steps after it, are constants of the gradient."""
    return config.truncated_latent_steps > 0 and not (isinstance(latent_steps, int) and latent_steps == 1)


def run(
    step: Step, state, latent_steps: int | jax.Array, config: RecursionConfig, *, fused: bool, leave_early: bool
) -> tuple:
    """Runs the T - 1 intermediate latent steps from `state`: the last state, and a list of reports, [steps, ...] each.

    fused: each latent step runs as kernels, which keep little for the backward pass. leave_early: stop when all tokens
    have stopped (`state.progress`).
    """
    static = isinstance(latent_steps, int)
    count = (latent_steps if static else config.latent_steps) - 1
    if not count:
        return state, []
    constant = functools.partial(step, truncated=True)
    if not static:
        step, constant = _skipping(step, latent_steps), _skipping(constant, latent_steps)
    policy, in_loop = config.remat, config.scan_latent_steps
    if count == 1 and policy == "full":  # one step's products do not grow with T, and keeping them saves time
        policy, in_loop = "none" if fused else "dots", True
    step = rematerialized(step, policy, in_loop=in_loop)
    if leave_early:
        return early_exit(step, state, latent_steps, count)
    unroll = not config.scan_latent_steps
    if config.truncated_latent_steps:
        return truncated(constant, step, state, count, min(config.truncated_latent_steps, count), unroll)
    return scan(step, state, 0, count, unroll)


def scan(step: Step, state, first: int, end: int, unroll: bool) -> tuple:
    """Latent steps first .. end - 1."""
    state, report = jax.lax.scan(step, state, jnp.arange(first, end, dtype=jnp.int32), unroll=unroll)
    return state, [report]


def truncated(constant: Step, step: Step, state, count: int, without_gradient: int, unroll: bool) -> tuple:
    """All `count` latent steps, the first of them by `constant`, which passes no gradient.

    `constant` is not rematerialized: the head of learned halting needs the states, and nothing else of it is kept.
    """
    state, reports = scan(constant, state, 0, without_gradient, unroll)
    if without_gradient == count:
        return state, reports
    state, others = scan(step, state, without_gradient, count, unroll)
    return state, reports + others


def early_exit(step: Step, state, latent_steps: int | jax.Array, count: int) -> tuple:
    """Latent steps until all tokens of the batch have stopped. The report of a latent step that did not run is zero."""
    empty = _report_of_none(step, state, jnp.zeros((), jnp.int32))
    reports = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), empty)

    def goes_on(carry):
        state, _, t = carry
        return (t < latent_steps - 1) & jnp.any(state.progress.running)

    def advance(carry):
        state, reports, t = carry
        state, report = step(state, t)
        return state, jax.tree.map(lambda rows, row: rows.at[t].set(row), reports, report), t + 1

    state, reports, _ = jax.lax.while_loop(goes_on, advance, (state, reports, jnp.zeros((), jnp.int32)))
    return state, [reports]


def _skipping(step: Step, latent_steps: jax.Array) -> Step:
    """`step` where t < T - 1; after that the state stays the same and the report is zero."""

    def skipped(state, t):
        return state, _report_of_none(step, state, t)

    return lambda state, t: jax.lax.cond(t < latent_steps - 1, step, skipped, state, t)


def _report_of_none(step: Step, state, t) -> RoutingReport:
    """The report of a latent step that did not run."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(step, state, t)[1])
