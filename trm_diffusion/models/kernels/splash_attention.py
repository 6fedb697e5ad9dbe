"""JAX's splash attention for TPUs, for sequences too long for `fused_attention`.

It iterates over blocks of queries and keys with a running softmax, so its memory does not grow with their product. Keys
that are masked, or pad the sequence to whole blocks, form a segment of their own, to which no query belongs. JAX
declares no cost for it, so the compiler's estimates of time and FLOPs leave its products out.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

BLOCK = 512  # queries and keys at a time; not tuned


def splash_attention(q_bnhd, k_bmhd, v_bmhd, mask_bm=None, interpret: bool = False) -> jax.Array:
    """Like `dot_product_attention`, on one TPU; `interpret` runs the kernels on other platforms."""
    (batch, n, heads, d), m = q_bnhd.shape, k_bmhd.shape[1]
    visible_bm = jnp.ones((batch, m), jnp.int32) if mask_bm is None else mask_bm.astype(jnp.int32)
    q, k, v, visible_bm = (_whole_blocks(x) for x in (q_bnhd * d**-0.5, k_bmhd, v_bmhd, visible_bm))
    attend = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((q.shape[1], k.shape[1]))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=BLOCK,
            block_kv=BLOCK,
            block_q_dkv=BLOCK,
            block_kv_dkv=BLOCK,
            block_q_dq=BLOCK,
            block_kv_dq=BLOCK,
        ),
        interpret=interpret,
    )
    segments = splash.SegmentIds(q=jnp.ones(q.shape[:2], jnp.int32), kv=visible_bm)
    attended = jax.vmap(attend)(*(x.swapaxes(1, 2) for x in (q, k, v)), segments)  # [B, H, N, d]
    return attended.swapaxes(1, 2)[:, :n]


def _whole_blocks(x: jax.Array) -> jax.Array:
    """x, with its tokens (axis 1) zero-padded to a multiple of BLOCK."""
    return jnp.pad(x, [(0, -x.shape[1] % BLOCK if axis == 1 else 0) for axis in range(x.ndim)])
