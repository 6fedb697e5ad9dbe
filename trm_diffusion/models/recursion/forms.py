"""Forms of the latent step that the paper does not have; each is a switch of `RecursionConfig`, off by default.

In the paper's form all of a latent step passes through low-rank maps that start at zero, and the state hardly moves.
Vectors of D learned numbers multiply channel by channel.

    step_embedding      h_t + e_t, and the gate sees y + e'_t; e and e' are learned, one row for each latent step
    attention_qk_norm   q and k of the intermediate attention are RMS-normalised per head, with learned scales
    attended_norm       g RMSNorm(Attn(q, k, v)) in the place of Attn(q, k, v), normalised per token, with the vector g
    base_input=blend    W_qkv sees x~ + g' (a_{T-1} - x~), with the vector g' from zero: full weights see the state, and
                        the block starts as its base
    base_step_input=blend   with base_every_step, W_qkv sees x~ + g' (a_{t-1} - x~) in the other latent steps too
    base_projections    with base_every_step, which of q, k and v the base adds to
    state=accumulate    a_t = a_{t-1} + g Attn(q, k, v), with the vector g
    state=gated         a_t = a_{t-1} + z (Attn(q, k, v) + x~ - a_{t-1}), z = sigmoid(w . h_t + b), with the vectors w
                        and b, from zero, so that z starts at 1/2
"""

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.layers import EPSILON
from trm_diffusion.models.recursion.config import PROJECTIONS, RecursionConfig
from trm_diffusion.models.recursion.gate import Conditioning


class Forms(nnx.Module):
    """The parameters of a block's forms, and where they act. Without any it has no parameters and changes nothing.

    Parameters added: 2 T D by step_embedding, D by state=accumulate or attended_norm, 2 D by state=gated, 2 D / H by
    attention_qk_norm, D by blend.
    """

    def __init__(self, width: int, heads: int, config: RecursionConfig):
        self.config = config
        gated = config.state == "gated"

        def learned(value: float, wanted: bool, *shape: int) -> nnx.Param | None:
            axes = (None,) * len(shape) + ("embed",)
            return nnx.Param(jnp.full((*shape, width), value, jnp.float32), logical_axes=axes) if wanted else None

        self.step_embedding = learned(0.0, config.step_embedding, config.latent_steps, 2)
        self.gain = learned(config.attended_gain, config.state == "accumulate" or config.attended_norm)
        self.gate_kernel = learned(0.0, gated)
        self.gate_bias = learned(0.0, gated)
        self.blend = learned(0.0, "blend" in (config.base_input, config.base_step_input))
        normalizes, head_dim = config.attention_qk_norm, width // heads
        self.query_scale = nnx.Param(jnp.ones(head_dim, jnp.float32)) if normalizes else None
        self.key_scale = nnx.Param(jnp.ones(head_dim, jnp.float32)) if normalizes else None

    def embedded(self, h_bnd: jax.Array, conditioning: Conditioning, t) -> tuple[jax.Array, Conditioning]:
        """h and the gate's conditioning of latent step t, from 0; those past the table have its last row."""
        if self.step_embedding is None:
            return h_bnd, conditioning
        table = self.step_embedding[...]
        of_h, of_gate = table[jnp.minimum(t, len(table) - 1)]
        timestep = conditioning.timestep + of_gate[None].astype(conditioning.timestep.dtype)
        return h_bnd + of_h[None, None].astype(h_bnd.dtype), conditioning._replace(timestep=timestep)

    def blended(self, a_bnd: jax.Array, x_bnd: jax.Array) -> jax.Array:
        """x~ + g' (a - x~)."""
        return x_bnd + _scaled(a_bnd - x_bnd, self.blend)

    def seen_by_base(self, h_bnd: jax.Array, a_bnd: jax.Array, x_bnd: jax.Array) -> jax.Array:
        """What the base projection sees in an intermediate latent step, [B, N, D]."""
        return h_bnd if self.config.base_step_input == "h" else self.blended(a_bnd, x_bnd)

    def with_base(self, qkv: jax.Array, base: jax.Array) -> jax.Array:
        """Adds the base's q, k and v, or those that are named, [B, N, 3, H, d]; the others are then not computed."""
        named = self.config.base_projections.split(",")
        if len(set(named)) == PROJECTIONS:
            return qkv + base
        parts = [qkv[:, :, i] + base[:, :, i] if name in named else qkv[:, :, i] for i, name in enumerate("qkv")]
        return jnp.stack(parts, axis=2)

    def heads(self, qkv: jax.Array) -> jax.Array:
        """q, k, v [B, N, 3, H, d] as the intermediate attention gets them."""
        if self.query_scale is None:
            return qkv
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = _scaled(_rms_normalized(q), self.query_scale), _scaled(_rms_normalized(k), self.key_scale)
        return jnp.stack([q, k, v], axis=2)

    def attended(self, attended_bnd: jax.Array) -> jax.Array:
        """Attn(q, k, v) as it joins the state."""
        if self.config.attended_norm:
            attended_bnd = _rms_normalized(attended_bnd)
        return attended_bnd if self.gain is None else _scaled(attended_bnd, self.gain)

    def next_state(self, new_bnd, *, before_bnd, attended_bnd, h_bnd) -> jax.Array:
        """a_t, from that of the paper's form (`new_bnd`), a_{t-1}, what `attended` gives, and h_t."""
        if self.config.state == "accumulate":
            return before_bnd + attended_bnd
        if self.config.state == "restart":
            return new_bnd
        logits = jnp.einsum("bnd,d->bn", h_bnd.astype(jnp.float32), self.gate_kernel[...])[..., None]
        z_bnd = jax.nn.sigmoid(logits + self.gate_bias[...][None, None])
        return before_bnd + z_bnd.astype(new_bnd.dtype) * (new_bnd - before_bnd)


def _rms_normalized(x: jax.Array) -> jax.Array:
    """x / sqrt(mean x^2 + EPSILON) over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPSILON)).astype(x.dtype)


def _scaled(x: jax.Array, vector: nnx.Param) -> jax.Array:
    """x [..., D] times a learned vector, in x's dtype."""
    return x * vector[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
