"""Attention: projection to heads, query-key normalisation, and the softmax attention itself."""

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.layers import linear


def dot_product_attention(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v per head. Returns [B, N, H, d] in q's dtype; the softmax runs in float32."""
    return jax.nn.dot_product_attention(q_bnhd, k_bmhd, v_bmhd)


class Attention(nnx.Module):
    """The base projections of one token stream: q, k, v in, heads out.

    Projected tensors are [B, N, 3, H, d] with q, k, v along axis 2, so that low-rank updates of the same shape can be
    added to them before the heads are normalised and attended.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dtype, rngs: nnx.Rngs):
        self.heads, self.head_dim = heads, width // heads
        self.qkv = linear(width, 3 * width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(width, width, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.query_norm = nnx.RMSNorm(self.head_dim, dtype=dtype, rngs=rngs) if qk_norm else None
        self.key_norm = nnx.RMSNorm(self.head_dim, dtype=dtype, rngs=rngs) if qk_norm else None

    def project(self, x_bnd: jax.Array) -> jax.Array:
        """[B, N, D] -> q, k, v before normalisation, [B, N, 3, H, d]."""
        return self.qkv(x_bnd).reshape(*x_bnd.shape[:-1], 3, self.heads, self.head_dim)

    def normalized_heads(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, 3, H, d] -> q, k, v, each [B, N, H, d], with q and k normalised if the model normalises them."""
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def attend(self, qkv: jax.Array, context: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """This stream's queries over its own keys and values, before the output projection.

        qkv: [B, N, 3, H, d]. context: keys and values of another stream, [B, L, H, d] each and already normalised,
        which are attended to as well (joint attention). Returns [B, N, D].
        """
        q, k, v = self.normalized_heads(qkv)
        if context is not None:
            k, v = jnp.concatenate([k, context[0]], axis=1), jnp.concatenate([v, context[1]], axis=1)
        attended = dot_product_attention(q, k, v)
        return attended.reshape(*attended.shape[:2], self.heads * self.head_dim)
