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
serve all latent steps. The switches in `RecursionConfig` cover what the sources leave open; those that go beyond the
paper are in forms.py.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.layers import layer_norm, modulate
from trm_diffusion.models.recursion import depth
from trm_diffusion.models.recursion.config import PROJECTIONS, RecursionConfig
from trm_diffusion.models.recursion.expert_mlp import ExpertMlp
from trm_diffusion.models.recursion.forms import Forms
from trm_diffusion.models.recursion.gate import Conditioning
from trm_diffusion.models.recursion.halting import Halting, Progress
from trm_diffusion.models.recursion.observe import Observed, summarized
from trm_diffusion.models.recursion.pool import Pool
from trm_diffusion.models.recursion.report import RoutingReport


class BlockAttention(Protocol):
    """What the recursion needs from its block's attention: `models.attention.Attention` has it, and yours can.

    H heads of d = D / H features. Both methods must work on any number of images.
    """

    def project(self, x_bnd: jax.Array, update: jax.Array | None = None) -> jax.Array:
        """The base projection W_qkv x, plus `update` if given: [B, N, D] -> q, k, v [B, N, 3, H, d]."""

    def attend(self, qkv: jax.Array, context: Any = None) -> jax.Array:
        """Attention of q, k, v [B, N, 3, H, d], before the output projection: [B, N, D], heads joined in order.

        context: what `Recursion.__call__` was given, such as the keys and values of a text; None is no context.
        Normalisation of queries and keys belongs here.
        """

    def entropy(self, qkv: jax.Array, context: Any = None) -> jax.Array:
        """Of the same attention: mean entropy over the logarithm of its length, []. Only to observe."""

    def weights(self, qkv: jax.Array, context: Any = None) -> jax.Array:
        """The same attention's mean over heads, [B, N, M]. Only to observe."""


class RecursionOutput(NamedTuple):
    qkv: jax.Array  # [B, N, 3, H, d], for the block's own attention
    report: RoutingReport  # one entry for each latent step


class Constants(NamedTuple):
    """What all latent steps share; see `Recursion.__call__`."""

    x_bnd: jax.Array
    shift_bd: jax.Array
    scale_bd: jax.Array
    conditioning: Conditioning
    key: jax.Array | None


class State(NamedTuple):
    """What one latent step hands to the next; the last two only with halting."""

    a_bnd: jax.Array
    qkv: jax.Array | None = None  # [B, N, 3, H, d] as last computed for each token
    progress: Progress | None = None


class Recursion(nnx.Module):
    """The latent steps of one block.

    Parameters added: S * (6 M r D + 2 P M D), with S pools (1, or T with one pool per latent step), P choices (1, or 3
    when routed per projection), M experts of rank r, width D; P M more per pool with a balance bias, D + 1 with
    learned halting, and those of forms.py and expert_mlp.py.
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
        self.forms = Forms(width, heads, config)
        self.expert_mlp = ExpertMlp(width, config, dtype=dtype, rngs=rngs) if config.expert_mlp else None

    def __call__(
        self,
        x_bnd: jax.Array,
        *,
        shift_bd: jax.Array,
        scale_bd: jax.Array,
        conditioning: Conditioning,
        attention: BlockAttention,
        context: Any = None,
        latent_steps: int | jax.Array | None = None,
        key: jax.Array | None = None,
        observe: bool = False,
    ) -> RecursionOutput:
        """The final q, k, v of the modulated visual tokens x~ [B, N, D] of a block.

        shift_bd, scale_bd: [B, D], Mod of the block: x~ = LN(x) * (1 + scale) + shift.
        context: passed to every `attention.attend`; in joint attention the text's keys and values, which stay constant.
        latent_steps: T; an int, or a traced integer scalar in 1 .. config.latent_steps (one program serves every
            depth). None is the config's.
        key: in training, draws the gate's noise, and capacity is bounded; None is inference.
        observe: also report what each latent step does (recursion/observe.py).

        Raises ValueError for a known depth below 1, or above the number of pools with pool=per_latent_step, and in
        training for a batch that does not divide into routing groups. A traced depth is not known while tracing:
        out of its range the experts' updates are NaN, except for tokens over capacity, and so is the loss.
        """
        config, halting, training = self.config, self.halting, key is not None
        steps = depth.checked(latent_steps, config)

        constants = Constants(x_bnd, shift_bd, scale_bd, conditioning, key)

        def latent_step(state, t, truncated=False):
            """Intermediate latent step t, from 0: a_t to a_{t+1}. truncated: only the halting head gets a gradient."""
            # A token that stops before its first latent step asks its experts once, for the keys and values it shows.
            running = None if halting is None else state.progress.running
            asking = None if halting is None else running | (t == 0)
            h_bnd, update, report = self._routed(constants, state.a_bnd, t, asking=asking)
            qkv = update
            if config.base_every_step:
                qkv = self.forms.with_base(qkv, attention.project(self.forms.seen_by_base(h_bnd, state.a_bnd, x_bnd)))
            if halting is not None:  # the others go on attending to the last keys and values of a stopped token
                qkv = jnp.where(asking[..., None, None, None], qkv, state.qkv)
                report = report._replace(running=jnp.mean(running.astype(jnp.float32)))
            heads = self.forms.heads(qkv)
            attended = self.forms.attended(attention.attend(heads, context))
            a_bnd = attended + x_bnd if config.residual == "before_norm" else attended
            a_bnd = self.forms.next_state(a_bnd, before_bnd=state.a_bnd, attended_bnd=attended, h_bnd=h_bnd)
            if self.expert_mlp is not None:
                a_bnd = a_bnd + self._mlp(constants, a_bnd, t)
            if truncated:
                a_bnd, qkv, report = jax.lax.stop_gradient((a_bnd, qkv, report))
            after = State(a_bnd)
            if halting is not None:
                a_bnd = jnp.where(running[..., None], a_bnd, state.a_bnd)
                progress = halting.advance(state.progress, state.a_bnd, a_bnd, t + 1, steps, training=training)
                after = State(a_bnd, qkv, progress)
            return after, report._replace(observed=Observed(update, heads, a_bnd)) if observe else report

        state, reports = depth.run(
            latent_step,
            self._start(jax.lax.stop_gradient(x_bnd) if depth.truncates(steps, config) else x_bnd, steps, training),
            steps,
            config,
            fused=self.pool.is_fused(x_bnd, training=training),
            leave_early=halting is not None and not training,
        )
        a_bnd, divergence = state.a_bnd, jnp.zeros(())
        if config.halting == "learned" and training:
            a_bnd, divergence = state.progress.expected.astype(x_bnd.dtype), jnp.mean(state.progress.divergence)
        _, update, report = self._routed(constants, a_bnd, steps - 1, valid=depth.in_range(steps, config))
        qkv = attention.project(self._base_input(a_bnd, x_bnd), update)
        last = Observed(update, qkv, a_bnd) if observe else None
        report = report._replace(halting_divergence=divergence, observed=last)
        reports.append(jax.tree.map(lambda leaf: leaf[None], report))
        report = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports)
        return RecursionOutput(qkv, summarized(report, x_bnd, attention, context) if observe else report)

    def _start(self, x_bnd: jax.Array, steps: int | jax.Array, training: bool) -> State:
        """The state before the first latent step, a_0 = x~."""
        if self.halting is None:
            return State(x_bnd)
        batch, tokens, width = x_bnd.shape
        qkv = jnp.zeros((batch, tokens, PROJECTIONS, self.heads, width // self.heads), x_bnd.dtype)
        return State(x_bnd, qkv, self.halting.start(x_bnd, steps, training=training))

    def _routed(self, constants: Constants, a_bnd, t, **options):
        """h of latent step t (from 0), the routed update of q, k, v [B, N, 3, H, d], and the report.

        options: as `Pool` takes them.
        """
        x_bnd, shift_bd, scale_bd, conditioning, key = constants
        h_bnd = self._modulated(a_bnd, x_bnd, shift_bd, scale_bd)
        h_bnd, conditioning = self.forms.embedded(h_bnd, conditioning, t)
        update, report = self._pool_at(t)(
            h_bnd,
            conditioning,
            state=(a_bnd, shift_bd, scale_bd),
            key=None if key is None else jax.random.fold_in(key, t),
            **options,
        )
        return h_bnd, update.reshape(*x_bnd.shape[:2], PROJECTIONS, self.heads, -1), report

    def _mlp(self, constants: Constants, a_bnd, t) -> jax.Array:
        """What the expert MLP adds to the state of latent step t (from 0), [B, N, D]."""
        x_bnd, shift_bd, scale_bd, conditioning, key = constants
        key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, t), 1)
        return self.expert_mlp(self._modulated(a_bnd, x_bnd, shift_bd, scale_bd), conditioning, key)

    def _modulated(self, a_bnd, x_bnd, shift_bd, scale_bd) -> jax.Array:
        """h, as the gate and the experts see the state, [B, N, D]."""
        h = layer_norm(a_bnd) if self.config.normalization else a_bnd
        if self.config.modulation:
            h = modulate(h, shift_bd, scale_bd)
        return h + x_bnd if self.config.residual == "after_norm" else h

    def _base_input(self, a_bnd, x_bnd) -> jax.Array:
        """What the base projection sees in the last latent step, [B, N, D]."""
        if self.config.base_input == "modulated":
            return x_bnd
        return a_bnd + x_bnd if self.config.base_input == "carry" else self.forms.blended(a_bnd, x_bnd)

    def _pool_at(self, t) -> Pool:
        if self.config.pool == "shared":
            return self.pool
        graphdef, state = nnx.split(self.pool)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[t], state))
