"""A gate and the experts it chooses among: one latent step's routed update of q, k and v.

On a TPU two kernels (models/kernels/fused_latent_step.py) compute it where they apply. They only know the paper's form
of h = Mod(LN(a)). `KERNELS_HONOUR` names the fields of `RecursionConfig` that the kernels, or the code around them,
honour for every value. If any other field differs from its default, the plain path runs. So a new switch is never
ignored on a TPU, and uses the kernels only once it is listed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.kernels import fused_latent_step
from trm_diffusion.models.partition import on_each_device, platform
from trm_diffusion.models.recursion.assignment import Assignment, assign, expert_capacity
from trm_diffusion.models.recursion.config import PROJECTIONS, RecursionConfig
from trm_diffusion.models.recursion.dispatch import cheapest_dispatch
from trm_diffusion.models.recursion.experts import LowRankExperts
from trm_diffusion.models.recursion.gate import Conditioning, Gate
from trm_diffusion.models.recursion.report import RoutingReport, report_of

KERNELS_HONOUR = frozenset({
    "blocks", "latent_steps", "pool", "base_input", "base_every_step",  # around the pool: recursion/layer.py
    "state", "attended_gain", "attended_norm", "attention_qk_norm",  # the same: recursion/forms.py
    "base_step_input", "base_projections", "expert_mlp",  # the same
    "scan_latent_steps", "truncated_latent_steps", "remat",  # recursion/depth.py
    "halting", "halting_epsilon", "halting_patience", "halting_prior", "halting_weight",  # a stopped token selects none
    "temperature", "forward_weight", "balance_bias_rate", "gate_inputs",  # `Gate.route`; tokens must be an input
    "routing_scope", "experts", "experts_per_token", "rank", "capacity_factor", "routing_group",  # the assignment
    "switch_loss_weight", "z_loss_weight",  # of the report
    "alpha", "init_down", "init_up",  # in the experts' weights
})  # fmt: skip


class Pool(nnx.Module):
    """A gate and the experts it chooses among."""

    def __init__(self, width: int, config: RecursionConfig, *, dtype, rngs: nnx.Rngs):
        self.config = config
        self.gate = Gate(
            width,
            config.experts,
            experts_per_token=config.experts_per_token,
            choices=_choices(config),
            temperature=config.temperature,
            inputs=tuple(config.gate_inputs.split(",")),
            forward_weight=config.forward_weight,
            balance_bias=config.balance_bias_rate > 0,
            rngs=rngs,
        )
        self.experts = LowRankExperts(
            width,
            config.experts,
            config.rank,
            alpha=config.alpha,
            init_down=config.init_down,
            init_up=config.init_up,
            dispatch=config.dispatch,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        h_bnd: jax.Array,
        conditioning: Conditioning,
        *,
        state: tuple[jax.Array, jax.Array, jax.Array],
        key: jax.Array | None,
        asking: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingReport]:
        """The routed low-rank update of q, k and v by h [B, N, D], [B, N, 3, D], and the report.

        state: a [B, N, D], shift and scale [B, D], from which h was computed; the kernels compute h from them without
            writing it to memory. key: of this latent step, in training. asking [B, N] bool: tokens that ask for an
            update; None is all. valid bool []: if False, the updates are NaN, except for tokens over capacity.
        """
        group, capacity = self._routing_group(h_bnd, training=key is not None)
        fused = self.is_fused(h_bnd, training=key is not None)
        if fused:
            token_logits, *state = self._token_logits_by_kernel(*state)
            routing = self.gate.route(token_logits + self.gate.condition_logits(conditioning)[:, None], key)
        else:
            routing = self.gate(h_bnd, conditioning, key)
        if asking is not None:  # expert -1 is none
            routing = routing._replace(experts=jnp.where(asking[..., None, None], routing.experts, -1))
        assignment = assign(routing, group, capacity)
        if valid is not None:  # in the weights, which are small
            assignment = assignment._replace(combine=jnp.where(valid, assignment.combine, jnp.nan))
        update = self._updates_by_kernel(*state, assignment) if fused else self.experts(h_bnd, assignment, capacity)
        return update, report_of(routing, assignment, asking)

    def is_fused(self, x_bnd: jax.Array, *, training: bool) -> bool:
        """Whether the kernels run: on a TPU, for a config they honour, where dense dispatch is cheapest and fits."""
        config, (_, tokens, width) = self.config, x_bnd.shape
        if platform() != "tpu" or not kernels_honour(config):
            return False
        group, capacity = self._routing_group(x_bnd, training=training)
        arguments = group * tokens, config.experts, capacity, _choices(config), config.rank
        pays = capacity is None or cheapest_dispatch("tpu", *arguments) == "dense"
        return pays and fused_latent_step.fits(tokens, width, config.experts, config.rank, x_bnd.dtype)

    def _routing_group(self, x_bnd: jax.Array, *, training: bool) -> tuple[int, int | None]:
        """Images in a routing group, and the experts' capacity for it; at inference (1, None)."""
        if not training:
            return 1, None
        config, (images, tokens, _) = self.config, x_bnd.shape
        group = min(config.routing_group, images)
        if images % group:
            raise ValueError(f"a batch of {images} images does not divide into routing groups of {group}")
        return group, expert_capacity(group * tokens, config.experts, config.experts_per_token, config.capacity_factor)

    def _token_logits_by_kernel(self, a_bnd, shift_bd, scale_bd) -> tuple[jax.Array, ...]:
        """The gate's token logits of h = Mod(LN(a)), [B, N, P, M], and the state for `_updates_by_kernel`."""
        kernel, tokens, images = self.gate.token_kernel[...], ("batch", None, None), ("batch", None)
        logits, a_bnd = on_each_device(
            fused_latent_step.fused_token_logits,
            (a_bnd, tokens),
            (shift_bd, images),
            (scale_bd, images),
            (kernel.reshape(len(kernel), -1), (None, None)),
            results=(tokens, tokens),
        )
        return logits.reshape(*logits.shape[:2], *kernel.shape[1:]), a_bnd, shift_bd, scale_bd

    def _updates_by_kernel(self, a_bnd, shift_bd, scale_bd, assignment: Assignment) -> jax.Array:
        """The experts' updates from h = Mod(LN(a)), [B, N, 3, D]."""
        weights = assignment.combine.reshape(*a_bnd.shape[:2], *assignment.combine.shape[2:])  # [B, N, P, M]
        down, up = self.experts.weights()
        updates = on_each_device(
            fused_latent_step.fused_updates,
            (a_bnd, ("batch", None, None)),
            (shift_bd, ("batch", None)),
            (scale_bd, ("batch", None)),
            (weights, ("batch", None, None, None)),
            (down, (None, None, None, None)),
            (up, (None, None, None, "heads")),
            results=PROJECTIONS * (("batch", None, "heads"),),
        )
        return jnp.stack(updates, axis=2)


def kernels_honour(config: RecursionConfig) -> bool:
    """Whether the kernels can compute this config; see the module's docstring."""
    fields = [field for field in dataclasses.fields(config) if field.name not in KERNELS_HONOUR]
    return "tokens" in config.gate_inputs and all(getattr(config, field.name) == field.default for field in fields)


def _choices(config: RecursionConfig) -> int:
    return PROJECTIONS if config.routing_scope == "per_projection" else 1
