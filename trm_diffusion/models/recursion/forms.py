"""Forms of the latent step that the paper does not have; each is a switch of `RecursionConfig`, off by default.

In the paper's form all of a latent step passes through low-rank maps that start at zero, and the state hardly moves.

    step_embedding   h_t + e_t, and the gate sees y + e'_t; e and e' are learned, one row for each latent step
"""

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.gate import Conditioning


class Forms(nnx.Module):
    """The parameters of a block's forms, and where they act. Without any it has no parameters and changes nothing.

    Parameters added: 2 T D by step_embedding.
    """

    def __init__(self, width: int, config: RecursionConfig):
        self.config = config
        self.step_embedding = (
            nnx.Param(jnp.zeros((config.latent_steps, 2, width)), logical_axes=(None, None, "embed"))
            if config.step_embedding
            else None
        )

    def embedded(self, h_bnd: jax.Array, conditioning: Conditioning, t) -> tuple[jax.Array, Conditioning]:
        """h and the gate's conditioning of latent step t, from 0; those past the table have its last row."""
        if self.step_embedding is None:
            return h_bnd, conditioning
        table = self.step_embedding[...]
        of_h, of_gate = table[jnp.minimum(t, len(table) - 1)]
        timestep = conditioning.timestep + of_gate[None].astype(conditioning.timestep.dtype)
        return h_bnd + of_h[None, None].astype(h_bnd.dtype), conditioning._replace(timestep=timestep)
