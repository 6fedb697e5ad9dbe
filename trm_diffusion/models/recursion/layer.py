"""Recursion over latent steps inside an attention layer, the mechanism of "The Thinking Pixel" (arXiv 2604.25299).

With x~ the modulated visual tokens of the block, T latent steps refine a state a before the block's own attention:

    a_0 = x~
    for t = 1 .. T-1:   h_t = Mod(LN(a_{t-1}))                                                   (paper)
                        q, k, v = sum_j w_j B_{e_j} A_{e_j} h_t,  e, w = gate(h_t, y)             (paper)
                        a_t = Attn(q, k, v) + x~                                                 (paper)
    t = T:              h_T = Mod(LN(a_{T-1}))
                        q, k, v = W_qkv x~ + sum_j w_j B_{e_j} A_{e_j} h_T                        (paper)

and the block goes on with attention over the final q, k, v. Mod is the block's own shift and scale, Attn the block's
own attention before its output projection, W_qkv the base projection, applied once. One pool of experts and one gate
serve all latent steps. The switches in `RecursionConfig` choose among the readings the sources leave open.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.kernels.fused_latent_step import fits
from trm_diffusion.models.layers import layer_norm, modulate
from trm_diffusion.models.partition import platform
from trm_diffusion.models.recursion.assignment import assign, expert_capacity
from trm_diffusion.models.recursion.config import PROJECTIONS, RecursionConfig
from trm_diffusion.models.recursion.dispatch import cheapest_dispatch
from trm_diffusion.models.recursion.gate import Conditioning
from trm_diffusion.models.recursion.halting import Halting, Progress
from trm_diffusion.models.recursion.pool import Pool
from trm_diffusion.models.recursion.report import RoutingReport, report_of
from trm_diffusion.models.remat import rematerialized


class Recursed(NamedTuple):
    """What the recursion hands back to its block."""

    update: jax.Array  # [B, N, 3, H, d] to be added to the base projections
    base_input: jax.Array  # [B, N, D] what the base projection is to see
    report: RoutingReport


class Recursion(nnx.Module):
    """The latent steps of one block.

    Parameters added: S * (6 M r D + 2 P M D), with S pools (1, or T with one pool per latent step), P choices (1, or 3
    when routed per projection), M experts of rank r, width D; P M more per pool with a balance bias, and D + 1 with
    learned halting.
    """

    def __init__(self, width: int, heads: int, config: RecursionConfig, *, dtype, rngs: nnx.Rngs):
        self.config, self.heads = config, heads

        def make_pool(key):
            return Pool(width, config, dtype=dtype, rngs=nnx.Rngs(key))

        if config.pool == "shared":
            self.pool = make_pool(rngs.params())
        else:  # stacked along a leading axis, one for each latent step
            self.pool = nnx.vmap(make_pool)(jax.random.split(rngs.params(), config.latent_steps))
        self.halting = (
            Halting(
                width,
                config.halting,
                epsilon=config.halting_epsilon,
                patience=config.halting_patience,
                prior=config.halting_prior,
                rngs=rngs,
            )
            if config.halting != "none"
            else None
        )

    def __call__(
        self,
        x_bnd: jax.Array,
        *,
        shift_bd: jax.Array,
        scale_bd: jax.Array,
        conditioning: Conditioning,
        attend: Callable[[jax.Array], jax.Array],
        project_base: Callable[[jax.Array], jax.Array],
        latent_steps: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Recursed:
        """Runs the recursion on the modulated visual tokens x~ of a block.

        attend: q, k, v of the visual tokens [B, N, 3, H, d] -> attended [B, N, D], before the output projection; in
            joint attention it holds the text's keys and values, which do not change over latent steps.
        project_base: the base projection, [B, N, D] -> [B, N, 3, H, d].
        latent_steps: T; an int, or a traced int32 scalar in 1 .. config.latent_steps (one program serves every
            depth). None is the config's.
        key: in training, draws the gate's noise, and capacity is bounded; None is inference.
        """
        block = _Block(x_bnd, shift_bd, scale_bd, conditioning, attend, project_base, key)
        steps = self.config.latent_steps if latent_steps is None else latent_steps
        a_bnd, divergence, reports = self._refined(block, steps)
        _, update, report = self._update(block, a_bnd, steps - 1, running=None)
        report = report._replace(halting_divergence=divergence)
        reports.append(jax.tree.map(lambda leaf: leaf[None], report))
        reports = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports)
        base_input = x_bnd if self.config.base_input == "modulated" else a_bnd + x_bnd
        return Recursed(update, base_input, reports)

    def _refined(self, block: "_Block", steps: int | jax.Array) -> tuple[jax.Array, jax.Array, list[RoutingReport]]:
        """The T - 1 intermediate latent steps: a_{T-1} [B, N, D], the halting divergence, and their reports."""
        config, halting = self.config, self.halting
        training = block.key is not None
        most = (steps if isinstance(steps, int) else config.latent_steps) - 1
        state = _State(block.x_bnd, None, None)
        if halting is not None:
            qkv = jnp.zeros((*block.x_bnd.shape[:2], PROJECTIONS, self.heads, block.x_bnd.shape[-1] // self.heads))
            state = _State(
                block.x_bnd,
                qkv.astype(block.x_bnd.dtype),
                halting.start(block.x_bnd, steps, training=training),
            )

        def body(state, t):
            if isinstance(steps, int):
                return self._latent_step(block, state, t, steps)
            run = functools.partial(self._latent_step, block, latent_steps=steps)
            return jax.lax.cond(
                t < steps - 1, run, lambda state, t: (state, _zeros_like_report(run, state, t)), state, t
            )

        policy, in_loop = config.remat, config.scan_latent_steps
        if most == 1 and policy == "full":  # what is kept of it does not grow with T, and saves time
            fused = self._is_fused(block.x_bnd, *self._routing_group(block.x_bnd, training=training))
            policy, in_loop = "none" if fused else "dots", True
        body, reports = rematerialized(body, policy, in_loop=in_loop), []
        if halting is not None and not training:
            if most:
                state, report = self._until_all_stop(body, state, steps, most)
                reports.append(report)
        else:
            scan = functools.partial(jax.lax.scan, unroll=not config.scan_latent_steps)
            truncated = min(config.truncated_latent_steps, most)
            if truncated:
                scanned = scan(body, state, jnp.arange(truncated, dtype=jnp.int32))
                state, report = jax.lax.stop_gradient(scanned)
                reports.append(report)
            if most > truncated:
                state, report = scan(body, state, jnp.arange(truncated, most, dtype=jnp.int32))
                reports.append(report)

        if halting is None or not training or config.halting != "learned":
            return state.a_bnd, jnp.zeros(()), reports
        return (
            state.progress.expected.astype(block.x_bnd.dtype),
            jnp.mean(state.progress.divergence),
            reports,
        )

    def _latent_step(self, block: "_Block", state: "_State", t, latent_steps) -> tuple["_State", RoutingReport]:
        """One intermediate latent step, t from 0: the state a_t becomes a_{t+1}."""
        config, progress = self.config, state.progress
        running = None if progress is None else progress.running
        h, qkv, report = self._update(block, state.a_bnd, t, running)
        if config.base_every_step:
            qkv = qkv + block.project_base(h)
        if running is not None:  # the others go on attending to what a stopped token last was
            qkv = jnp.where(running[..., None, None, None], qkv, state.qkv)
        attended = block.attend(qkv)
        a_bnd = attended + block.x_bnd if config.residual == "before_norm" else attended
        if running is None:
            return _State(a_bnd, None, None), report
        a_bnd = jnp.where(running[..., None], a_bnd, state.a_bnd)
        training = block.key is not None
        progress = self.halting.advance(progress, state.a_bnd, a_bnd, t + 1, latent_steps, training=training)
        return _State(a_bnd, qkv, progress), report

    def _until_all_stop(self, body, state: "_State", steps, most: int) -> tuple["_State", RoutingReport]:
        """The intermediate latent steps at inference, left as soon as no token of the batch runs any more."""
        empty = _zeros_like_report(body, state, jnp.zeros((), jnp.int32))
        reports = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), empty)

        def goes_on(carry):
            state, _, t = carry
            return (t < steps - 1) & jnp.any(state.progress.running)

        def advance(carry):
            state, reports, t = carry
            state, report = body(state, t)
            return state, jax.tree.map(lambda all_, one: all_.at[t].set(one), reports, report), t + 1

        state, reports, _ = jax.lax.while_loop(goes_on, advance, (state, reports, jnp.zeros((), jnp.int32)))
        return state, reports

    def _update(self, block: "_Block", a_bnd: jax.Array, t, running: jax.Array | None):
        """h, the routed low-rank update of q, k, v [B, N, 3, H, d], and the report of latent step t, from 0.

        running [B, N]: tokens that ask for an update; None is all of them.
        """
        x_bnd, pool, h = block.x_bnd, self._pool_at(t), self._modulated(block, a_bnd)
        key = None if block.key is None else jax.random.fold_in(block.key, t)
        group, capacity = self._routing_group(x_bnd, training=key is not None)
        fused = self._is_fused(x_bnd, group, capacity)
        if fused:
            of_tokens, a_bnd = pool.fused_token_logits(a_bnd, block.shift_bd, block.scale_bd)
            routing = pool.gate.route(of_tokens + pool.gate.condition_logits(block.conditioning)[:, None], key)
        else:
            routing = pool.gate(h, block.conditioning, key)
        if running is not None:  # expert -1 is none of them
            routing = routing._replace(experts=jnp.where(running[..., None, None], routing.experts, -1))
        assignment = assign(routing, group, capacity)
        if fused:
            update = pool.fused_updates(a_bnd, block.shift_bd, block.scale_bd, assignment)
        else:
            update = pool.experts(h, assignment, capacity)  # [B, N, 3, D]
        update = update.reshape(*x_bnd.shape[:2], PROJECTIONS, self.heads, -1)
        return h, update, report_of(routing, assignment, running)

    def _modulated(self, block: "_Block", a_bnd: jax.Array) -> jax.Array:
        """h, as the gate and the experts see the state, [B, N, D]."""
        h = layer_norm(a_bnd) if self.config.normalization else a_bnd
        if self.config.modulation:
            h = modulate(h, block.shift_bd, block.scale_bd)
        return h + block.x_bnd if self.config.residual == "after_norm" else h

    def _is_fused(self, x_bnd: jax.Array, group: int, capacity: int | None) -> bool:
        """Whether models/kernels/fused_latent_step.py does it: on a TPU, in the paper's form, where dense pays."""
        c, (_, tokens, width) = self.config, x_bnd.shape
        as_in_paper = c.normalization and c.modulation and c.residual == "before_norm" and "tokens" in c.gate_inputs
        if platform() != "tpu" or c.dispatch != "auto" or not as_in_paper:
            return False
        choices = PROJECTIONS if c.routing_scope == "per_projection" else 1
        arguments = group * tokens, c.experts, capacity, choices, c.rank
        pays = capacity is None or cheapest_dispatch("tpu", *arguments) == "dense"
        return pays and fits(tokens, width, c.experts, c.rank, x_bnd.dtype)

    def _routing_group(self, x_bnd, *, training: bool) -> tuple[int, int | None]:
        """Images to a routing group, and the experts' capacity in it; at inference each image stands alone."""
        if not training:
            return 1, None
        config, group = self.config, min(self.config.routing_group, x_bnd.shape[0])
        tokens = group * x_bnd.shape[1]
        return group, expert_capacity(tokens, config.experts, config.experts_per_token, config.capacity_factor)

    def _pool_at(self, t) -> Pool:
        if self.config.pool == "shared":
            return self.pool
        graphdef, state = nnx.split(self.pool)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[t], state))


class _Block(NamedTuple):
    """What one call of the recursion is given; see `Recursion.__call__`."""

    x_bnd: jax.Array
    shift_bd: jax.Array
    scale_bd: jax.Array
    conditioning: Conditioning
    attend: Callable[[jax.Array], jax.Array]
    project_base: Callable[[jax.Array], jax.Array]
    key: jax.Array | None


class _State(NamedTuple):
    """What is carried from one latent step to the next; the last two only where tokens may halt."""

    a_bnd: jax.Array
    qkv: jax.Array | None  # [B, N, 3, H, d] as last computed for each token
    progress: Progress | None


def _zeros_like_report(step: Callable, state: _State, t) -> RoutingReport:
    """The report of a latent step that did not run."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(step, state, t)[1])
