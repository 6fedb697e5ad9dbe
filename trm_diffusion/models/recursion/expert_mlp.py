"""A low-rank MLP after the attention of an intermediate latent step, mixed from experts that a gate of its own chooses.

    a_t <- a_t + sum_j w_j V_e gelu(U_e Mod(LN(a_t)))       e, w = gate(Mod(LN(a_t)), y)

U and V are D -> r -> D. V starts at zero. No token is dropped: every expert is computed for every token.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.layers import gelu
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.gate import Conditioning, Gate


class ExpertMlp(nnx.Module):
    """Shared by all latent steps. Adds 2 M r D + 2 M D parameters."""

    def __init__(self, width: int, config: RecursionConfig, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.gate = Gate(
            width,
            config.experts,
            experts_per_token=config.experts_per_token,
            temperature=config.temperature,
            inputs=tuple(config.gate_inputs.split(",")),
            forward_weight=config.forward_weight,
            rngs=rngs,
        )
        shape = (config.experts, config.rank, width)
        init = nnx.initializers.normal(width**-0.5)
        self.down = nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=("expert", "rank", "embed"))  # U
        self.up = nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=("expert", "rank", "embed"))  # V

    def __call__(self, h_bnd: jax.Array, conditioning: Conditioning, key: jax.Array | None) -> jax.Array:
        """What is added to the state, [B, N, D]. key: draws the gate's noise in training; None is inference."""
        routing = self.gate(h_bnd, conditioning, key)
        chosen = jax.nn.one_hot(routing.experts, self.up.shape[0], dtype=jnp.float32)  # [B, N, 1, k, M]
        weights = jnp.einsum("bnpk,bnpkm->bnm", routing.weights, chosen).astype(self.dtype)
        down, up = self.down[...].astype(self.dtype), self.up[...].astype(self.dtype)
        hidden = gelu(jnp.einsum("bnd,mrd->bnmr", h_bnd.astype(self.dtype), down))
        return jnp.einsum("bnmr,mrd->bnd", hidden * weights[..., None], up)
