"""What the diffusion transformers share: their settings, one stream of tokens through a block, the final layer."""

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.attention import Attention
from trm_diffusion.models.layers import ZEROS, Mlp, linear, modulated_norm
from trm_diffusion.models.recursion import Recursion, RecursionConfig, recursive_blocks
from trm_diffusion.models.remat import kept
from trm_diffusion.models.stack import StackLayout, segment_lengths


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    depth: int = 28  # transformer blocks
    width: int = 1152  # D, features of a token
    heads: int = 16  # H, attention heads
    patch: int = 2  # pixels (or latent cells) a side of one token
    mlp_ratio: float = 4.0  # hidden width of the MLP over D
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    attention: str = "auto"  # auto, xla, or a kernel: fused, splash, cudnn (models/attention.py says which runs where)
    frequency_shift: int = 0  # of a DiT's timestep embedding: 0 as it was published, 1 as diffusers computes it
    dtype: str = "bfloat16"  # of the computation; parameters, norms, softmax and gate are float32
    scan_blocks: bool = True  # run equal blocks under one scan (compiles once); False unrolls them
    remat: str = "none"  # what the backward pass of a block keeps: none, selective, dots, full
    recursion: RecursionConfig = dataclasses.field(default_factory=RecursionConfig)


def attention_of(config: TransformerConfig, *, output: bool = True, rngs: nnx.Rngs) -> Attention:
    """The attention of one stream, as the config says."""
    return Attention(
        config.width,
        config.heads,
        qk_norm=config.qk_norm,
        output=output,
        implementation=config.attention,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def recursion_of(config: TransformerConfig, *, rngs: nnx.Rngs) -> Recursion:
    """The recursion of one block, as the config says."""
    return Recursion(config.width, config.heads, config.recursion, dtype=jnp.dtype(config.dtype), rngs=rngs)


def layout_of(config: TransformerConfig, kinds: Sequence[Hashable]) -> StackLayout:
    """How blocks of these kinds lie in the parameters."""
    segments = tuple(segment_lengths(kinds, config.scan_blocks))
    return StackLayout(segments, recursive_blocks(config.recursion.blocks, config.depth), config.scan_blocks)


class Stream(nnx.Module):
    """One stream's own weights in an adaLN-Zero block: modulation, the attention's projections, MLP.

    chunks: vectors that the modulation gives, [B, D] each: 6 are shift, scale, gate of the attention and of the MLP; 9
        have three more for a second attention. 2 are a shift and scale alone, of a stream that ends here: it is
        attended to, and has neither output projection nor MLP.
    """

    def __init__(self, config: TransformerConfig, *, chunks: int = 6, rngs: nnx.Rngs):
        dtype, width, ends = jnp.dtype(config.dtype), config.width, chunks == 2
        self.chunks = chunks
        self.modulation = linear(width, chunks * width, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)
        self.attention = attention_of(config, output=not ends, rngs=rngs)
        self.mlp = None if ends else Mlp(width, int(width * config.mlp_ratio), dtype=dtype, rngs=rngs)

    def modulations(self, conditioning_bd: jax.Array) -> list[jax.Array]:
        """The `chunks` vectors, [B, D] each."""
        return jnp.split(self.modulation(jax.nn.silu(conditioning_bd)), self.chunks, axis=-1)

    def finish(self, x_bnd, attended_bnd, gate_1, shift_2, scale_2, gate_2) -> jax.Array:
        """x + g1 W_o attended, then x + g2 MLP(Mod(LN(x))); the gates, shift and scale are [B, D]."""
        x_bnd = x_bnd + gate_1[:, None, :] * self.attention.out(attended_bnd)
        return x_bnd + gate_2[:, None, :] * kept(self.mlp(modulated_norm(x_bnd, shift_2, scale_2)))


class FinalLayer(nnx.Module):
    """adaLN and a zero-initialised linear map from tokens to patches, [B, N, D] -> [B, N, patch^2 * C]."""

    def __init__(self, config: TransformerConfig, out_channels: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        width, patch_features = config.width, config.patch**2 * out_channels
        self.modulation = linear(width, 2 * width, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)
        self.out = linear(width, patch_features, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, x_bnd, conditioning_bd):
        shift, scale = jnp.split(self.modulation(jax.nn.silu(conditioning_bd)), 2, axis=-1)
        return self.out(modulated_norm(x_bnd, shift, scale))
