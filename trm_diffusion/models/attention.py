"""Attention: projection to heads, query-key normalisation, and the softmax attention itself."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.kernels.fused_attention import MASKED, fits, fused_attention
from trm_diffusion.models.kernels.splash_attention import splash_attention
from trm_diffusion.models.layers import linear
from trm_diffusion.models.partition import on_each_device
from trm_diffusion.models.remat import kept

IMPLEMENTATIONS = ("auto", "xla", "fused", "splash", "cudnn")
HALF = (jnp.bfloat16, jnp.float16)


def dot_product_attention(
    q_bnhd: jax.Array,
    k_bmhd: jax.Array,
    v_bmhd: jax.Array,
    mask_bm: jax.Array | None = None,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v per head. Returns [B, N, H, d] in q's dtype; the softmax runs in float32.

    mask_bm: bool, False for keys that no query attends to; None means all True. implementation: "xla" writes the logits
    to memory. The others name a kernel that does not, and fall back to "xla" where the kernel does not apply:

        fused   TPU; sequences that fit in its vector memory, up to about 2,048 tokens (kernels/fused_attention.py)
        splash  TPU; sequences of any length (kernels/splash_attention.py)
        cudnn   NVIDIA GPU; bfloat16 and float16, sequences of even length, head sizes that are multiples of 8 up to 128
        auto    on a TPU, in bfloat16: fused, or splash if the sequence does not fit; on an NVIDIA GPU: cudnn

    One program serves every platform. Both TPU kernels have run in Pallas's interpreter, and fused has been compiled
    for one TPU chip; neither has run on a TPU yet. cuDNN's kernel has run on an H100 without a mask; with a mask it has
    only been traced.
    """
    operands = q_bnhd, k_bmhd, v_bmhd, mask_bm
    kernels = {}
    if (chosen := chosen_for_tpu(implementation, q_bnhd, k_bmhd)) != "xla":
        kernels["tpu"] = functools.partial(_per_device, _TPU_KERNELS[chosen])
    if implementation in ("auto", "cudnn") and _cudnn_applies(q_bnhd, k_bmhd):
        kernels["cuda"] = functools.partial(_per_device, cudnn_attention)
    return jax.lax.platform_dependent(*operands, **kernels, default=xla_attention)


_TPU_KERNELS = {"fused": fused_attention, "splash": splash_attention}


def chosen_for_tpu(implementation: str, q_bnhd: jax.Array, k_bmhd: jax.Array) -> str:
    """The implementation that runs on a TPU: "xla", "fused" or "splash"."""
    if implementation == "auto" and q_bnhd.dtype == jnp.bfloat16:
        return "fused" if fits(q_bnhd, k_bmhd) else "splash"
    applies = {"fused": fits(q_bnhd, k_bmhd), "splash": True}.get(implementation, False)
    return implementation if applies else "xla"


def _cudnn_applies(q_bnhd, k_bmhd) -> bool:
    """Whether cuDNN's kernel takes these arrays.

    JAX traces it only in a process that has an NVIDIA GPU, and refuses gradients for odd lengths.
    """
    n, m, head_dim = q_bnhd.shape[1], k_bmhd.shape[1], q_bnhd.shape[-1]
    shapes = head_dim % 8 == 0 and head_dim <= 128 and n % 2 == m % 2 == 0
    return q_bnhd.dtype in HALF and shapes and jax.default_backend() == "gpu"


def _per_device(kernel: Callable, q_bnhd, k_bmhd, v_bmhd, mask_bm=None) -> jax.Array:
    """Runs the kernel on each device's own images and heads; sharded sequences are gathered first."""
    heads = ("batch", None, "heads", None)
    masks = [] if mask_bm is None else [(mask_bm, ("batch", None))]
    return on_each_device(kernel, (q_bnhd, heads), (k_bmhd, heads), (v_bmhd, heads), *masks)


def xla_attention(q_bnhd, k_bmhd, v_bmhd, mask_bm=None) -> jax.Array:
    """Like `dot_product_attention`, in operations that every compiler supports.

    Heads come before tokens, so that each product is a plain matmul of whole matrices. The softmax is normalised after
    the product with v, where rows are shorter. `jax.nn.dot_product_attention` does neither and is slower on a CPU.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q_bnhd, k_bmhd, v_bmhd))
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask_bm is not None:
        logits = jnp.where(mask_bm[:, None, None, :], logits, MASKED)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    numerators = jnp.exp((logits - largest) * q.shape[-1] ** -0.5)
    out = jnp.einsum("bhnm,bhmd->bhnd", numerators.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.sum(numerators, axis=-1, keepdims=True)
    return out.swapaxes(1, 2).astype(q.dtype)


def cudnn_attention(q_bnhd, k_bmhd, v_bmhd, mask_bm=None) -> jax.Array:
    """Like `dot_product_attention`, with cuDNN's kernel, which needs a mask with a row for every query."""
    mask = None
    if mask_bm is not None:
        mask = jnp.broadcast_to(mask_bm[:, None, None, :], (len(mask_bm), 1, q_bnhd.shape[1], mask_bm.shape[1]))
    return jax.nn.dot_product_attention(q_bnhd, k_bmhd, v_bmhd, mask=mask, implementation="cudnn")


class Context(NamedTuple):
    """The keys and values of another token stream in joint attention."""

    keys: jax.Array  # [B, L, H, d], normalised
    values: jax.Array  # [B, L, H, d]
    mask: jax.Array | None = None  # [B, L] bool, False for padding; None means all True


class Attention(nnx.Module):
    """The attention of one token stream, with its q, k, v and output projections.

    Projected tensors are [B, N, 3, H, d] with q, k, v along axis 2, so that low-rank updates of the same shape can be
    added to them before the heads are normalised.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        output: bool = True,
        implementation: str = "auto",
        dtype,
        rngs: nnx.Rngs,
    ):
        """output: whether the stream has an output projection; False if its queries are not used."""
        self.heads, self.head_dim, self.implementation = heads, width // heads, implementation
        self.qkv = linear(width, 3 * width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(width, width, axes=("heads", "embed"), dtype=dtype, rngs=rngs) if output else None
        self.query_norm = nnx.RMSNorm(self.head_dim, dtype=dtype, rngs=rngs) if qk_norm else None
        self.key_norm = nnx.RMSNorm(self.head_dim, dtype=dtype, rngs=rngs) if qk_norm else None

    def project(self, x_bnd: jax.Array, update: jax.Array | None = None) -> jax.Array:
        """[B, N, D] -> q, k, v before normalisation, [B, N, 3, H, d]; adds `update`, of that shape, if given.

        q, k and v are separate products, and updates are added before they are stacked. So each is computed in the
        layout in which the attention reads it, and the stack, which is split again, is never written to memory.
        """
        x, kernel, bias = nnx.nn.dtypes.promote_dtype(
            (x_bnd, self.qkv.kernel[...], self.qkv.bias[...]), dtype=self.qkv.dtype
        )
        shape = (3, self.heads, self.head_dim)
        kernel, bias = kernel.reshape(-1, *shape), bias.reshape(1, 1, *shape)
        qkv = [kept(jnp.einsum("bnd,dhe->bnhe", x, kernel[:, i]) + bias[:, :, i]) for i in range(3)]
        if update is not None:
            qkv = [one + more for one, more in zip(qkv, _unstacked(update), strict=True)]
        return jnp.stack(qkv, axis=2)

    def normalized_heads(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, 3, H, d] -> q, k, v, each [B, N, H, d], with q and k normalised if the config says so."""
        q, k, v = _unstacked(qkv)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def attend(
        self,
        qkv: jax.Array,
        context: Context | None = None,
        *,
        queries: jax.Array | None = None,
        mask_bn: jax.Array | None = None,
    ) -> jax.Array:
        """Attention of this stream's queries over its own keys and values, before the output projection.

        qkv: [B, N, 3, H, d]. context: another stream, whose keys and values are attended to as well (joint attention).
        queries: the other stream's normalised queries [B, L, H, d], which attend in the same pass. mask_bn: bool, False
        for tokens of this stream that no query attends to. Returns [B, N, D], or [B, N + L, D] with `queries`, whose
        results come last.
        """
        q, k, v = self.normalized_heads(qkv)
        mask = mask_bn
        if context is not None:
            masks = (mask_bn, k), (context.mask, context.keys)
            if any(given is not None for given, _ in masks):
                whole = [jnp.ones(keys.shape[:2], bool) if given is None else given for given, keys in masks]
                mask = jnp.concatenate(whole, axis=1)
            k, v = jnp.concatenate([k, context.keys], axis=1), jnp.concatenate([v, context.values], axis=1)
        if queries is not None:
            q = jnp.concatenate([q, queries], axis=1)
        attended = dot_product_attention(q, k, v, mask, implementation=self.implementation)
        return attended.reshape(*attended.shape[:2], self.heads * self.head_dim)

    def weights(self, qkv: jax.Array, context: Context | None = None) -> jax.Array:
        """The softmax of `attend`, averaged over heads: float32 [B, N, N + L], the context's L keys last."""
        return jnp.mean(self._softmax(qkv, context)[0], axis=1)

    def entropy(self, qkv: jax.Array, context: Context | None = None) -> jax.Array:
        """Mean entropy of the attention over the logarithm of its length, float32 []: 1 is uniform, and 0 one key."""
        p, mask_bm = self._softmax(qkv, context)
        entropies = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)  # [B, H, N]
        lengths = jnp.log(jnp.maximum(jnp.sum(mask_bm, axis=1), 2).astype(jnp.float32))
        return jnp.mean(entropies / lengths[:, None, None])

    def _softmax(self, qkv: jax.Array, context: Context | None) -> tuple[jax.Array, jax.Array]:
        """The softmax of `attend`, float32 [B, H, N, M], and which keys are attended to, bool [B, M].

        Arguments as of `attend`. It writes the logits to memory.
        """
        q, k, _ = self.normalized_heads(qkv)
        mask = jnp.ones(k.shape[:2], bool)
        if context is not None:
            of_context = jnp.ones(context.keys.shape[:2], bool) if context.mask is None else context.mask
            k, mask = jnp.concatenate([k, context.keys], axis=1), jnp.concatenate([mask, of_context], axis=1)
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * self.head_dim**-0.5
        return jax.nn.softmax(logits, axis=-1, where=mask[:, None, None, :]), mask


def _unstacked(qkv: jax.Array) -> list[jax.Array]:
    """[B, N, 3, H, d] -> three of [B, N, H, d], by a split because its transpose is a concatenation."""
    return [part.squeeze(2) for part in jnp.split(qkv, 3, axis=2)]
