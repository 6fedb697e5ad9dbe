"""Low-rank experts for the q, k and v projections.

An expert e updates projection p of token h by B_{e,p} A_{e,p} h, two maps D -> r -> D; a token's update is the sum over
its selected experts, weighted by the gate (paper). B starts at zero, so an untrained expert changes nothing, unless
`init_up` says otherwise.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.partition import lay
from trm_diffusion.models.recursion.assignment import Assignment
from trm_diffusion.models.recursion.config import PROJECTIONS
from trm_diffusion.models.recursion.dispatch import expert_updates


class LowRankExperts(nnx.Module):
    """M experts of rank r for each of q, k and v. Adds 6 * M * r * width parameters."""

    def __init__(
        self,
        width: int,
        experts: int,
        rank: int,
        *,
        alpha: float | None = None,
        init_down: float = 1.0,
        init_up: float = 0.0,
        dispatch: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        """alpha: updates are scaled by alpha / rank; None does not scale.

        init_down, init_up: standard deviation of A and B, in units of width^-1/2 and rank^-1/2, so that an update's
            features are about init_down init_up times those of h.
        """
        self.dispatch, self.dtype = dispatch, dtype
        self.scale = None if alpha is None else alpha / rank
        init = nnx.initializers.normal(init_down * width**-0.5)
        # Both are [3, M, r, D]: with M as the last axis but one, a TPU would pad 2 experts to 8 rows of a tile.
        self.down = nnx.Param(  # A
            jnp.moveaxis(init(rngs.params(), (width, PROJECTIONS, experts, rank), jnp.float32), 0, -1),
            logical_axes=(None, "expert", "rank", "embed"),
        )
        shape = (PROJECTIONS, experts, rank, width)
        self.up = nnx.Param(  # B
            nnx.initializers.normal(init_up * rank**-0.5)(rngs.params(), shape, jnp.float32)
            if init_up
            else jnp.zeros(shape, jnp.float32),
            logical_axes=(None, "expert", "rank", "heads"),
        )

    def __call__(self, h_bnd: jax.Array, assignment: Assignment, capacity: int | None) -> jax.Array:
        """The weighted low-rank updates of q, k and v: [B, N, D] -> [B, N, 3, D]."""
        return expert_updates(h_bnd.astype(self.dtype), *self.weights(), assignment, capacity, self.dispatch)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """A and (scaled) B in the dtype of the computation, [3, M, r, D] each, gathered from their devices."""
        up = self.up[...] if self.scale is None else self.scale * self.up[...]
        down, up = self.down[...].astype(self.dtype), up.astype(self.dtype)
        return lay(down, None, None, None, None), lay(up, None, None, None, "heads")
