"""A gate and the experts it chooses among, and what both do by kernels on a TPU, divided over devices."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.kernels.fused_latent_step import dense_updates, token_logits
from trm_diffusion.models.partition import on_each_device
from trm_diffusion.models.recursion.assignment import Assignment
from trm_diffusion.models.recursion.config import PROJECTIONS
from trm_diffusion.models.recursion.experts import LowRankExperts
from trm_diffusion.models.recursion.gate import Gate

if TYPE_CHECKING:
    from trm_diffusion.models.recursion.config import RecursionConfig


class Pool(nnx.Module):
    """A gate and the experts it chooses among."""

    def __init__(self, width: int, config: "RecursionConfig", *, dtype, rngs: nnx.Rngs):
        self.gate = Gate(
            width,
            config.experts,
            experts_per_token=config.experts_per_token,
            choices=PROJECTIONS if config.routing_scope == "per_projection" else 1,
            temperature=config.temperature,
            inputs=tuple(config.gate_inputs.split(",")),
            forward_weight=config.forward_weight,
            balance_bias=config.balance_bias_rate > 0,
            rngs=rngs,
        )
        self.experts = LowRankExperts(
            width, config.experts, config.rank, dispatch=config.dispatch, dtype=dtype, rngs=rngs
        )

    def fused_token_logits(self, a_bnd, shift_bd, scale_bd) -> tuple[jax.Array, jax.Array]:
        """The gate's token logits by h = Mod(LN(a)), [B, N, P, M], and a itself for `fused_updates`; on a TPU."""
        kernel, tokens, images = self.gate.token_kernel[...], ("batch", None, None), ("batch", None)
        logits, a_bnd = on_each_device(
            token_logits,
            (a_bnd, tokens),
            (shift_bd, images),
            (scale_bd, images),
            (kernel.reshape(len(kernel), -1), (None, None)),
            results=(tokens, tokens),
        )
        return logits.reshape(*logits.shape[:2], *kernel.shape[1:]), a_bnd

    def fused_updates(self, a_bnd, shift_bd, scale_bd, assignment: Assignment) -> jax.Array:
        """The experts' updates by h = Mod(LN(a)), [B, N, 3, D]; on a TPU."""
        weights = assignment.combine.reshape(*a_bnd.shape[:2], *assignment.combine.shape[2:])  # [B, N, P, M]
        down, up = self.experts.weights()
        updates = on_each_device(
            dense_updates,
            (a_bnd, ("batch", None, None)),
            (shift_bd, ("batch", None)),
            (scale_bd, ("batch", None)),
            (weights, ("batch", None, None, None)),
            (down, (None, None, None, None)),
            (up, (None, None, None, "heads")),
            results=PROJECTIONS * (("batch", None, "heads"),),
        )
        return jnp.stack(updates, axis=2)
