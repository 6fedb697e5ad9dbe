"""What the diffusion transformers share: settings, one token stream of a block, the final layer."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.attention import IMPLEMENTATIONS, Attention
from trm_diffusion.models.layers import ZEROS, Mlp, linear, modulated_norm
from trm_diffusion.models.recursion import Recursion, RecursionConfig, RoutingReport, recursive_blocks
from trm_diffusion.models.recursion.looped import looped_blocks, repeated
from trm_diffusion.models.remat import POLICIES, kept
from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.models.stack import StackLayout, segment_lengths


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Settings):
    depth: int = setting(28, least=1)  # transformer blocks
    width: int = setting(1152, least=4, multiple_of=4)  # D, features per token; positions need a multiple of 4
    heads: int = setting(16, least=1)  # H, attention heads
    patch: int = setting(2, least=1)  # side of a token's patch, in pixels (or latent cells)
    mlp_ratio: float = setting(4.0, least=0.01)  # hidden width of the MLP, as a multiple of D
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    attention: str = setting("auto", choices=IMPLEMENTATIONS)  # models/attention.py says which runs where
    frequency_shift: int = setting(0, choices=(0, 1))  # DiT's timestep embedding: 0 as published, 1 as in diffusers
    # dtype of the computation; parameters, norms, softmax and gate are float32
    dtype: str = setting("bfloat16", choices=("float32", "bfloat16"))
    scan_blocks: bool = True  # run equal blocks under one scan (compiles once); False unrolls them
    remat: str = setting("none", choices=POLICIES)  # what the backward pass of a block keeps
    recursion: RecursionConfig = dataclasses.field(default_factory=RecursionConfig)


def attention_of(config: TransformerConfig, *, output: bool = True, rngs: nnx.Rngs) -> Attention:
    """The attention of one stream, as configured."""
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
    """The recursion of one block, as configured."""
    return Recursion(config.width, config.heads, config.recursion, dtype=jnp.dtype(config.dtype), rngs=rngs)


def loop_of(config: TransformerConfig) -> dict:
    """The arguments of `BlockStack` for the config's loop."""
    recursion = config.recursion
    return {
        "loop": looped_blocks(recursion, config.depth),
        "repeat": functools.partial(repeated, config=recursion) if recursion.looped else None,
    }


def layout_of(config: TransformerConfig, kinds: Sequence[Hashable]) -> StackLayout:
    """How blocks of these kinds are stored in the parameters."""
    segments = tuple(segment_lengths(kinds, config.scan_blocks))
    return StackLayout(segments, recursive_blocks(config.recursion.blocks, config.depth), config.scan_blocks)


class Stream(nnx.Module):
    """One stream's own weights in an adaLN-Zero block: modulation, attention projections, MLP.

    chunks: number of modulation vectors, [B, D] each. 6: shift, scale, gate of the attention and of the MLP. 9: three
        more for a second attention. 2: only a shift and a scale, for a stream that ends here: it is attended to, and
        has neither an output projection nor an MLP.
    """

    def __init__(self, config: TransformerConfig, *, chunks: int = 6, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.width
        ends = chunks == 2
        self.chunks = chunks
        self.modulation = linear(width, chunks * width, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)
        self.attention = attention_of(config, output=not ends, rngs=rngs)
        self.mlp = None if ends else Mlp(width, int(width * config.mlp_ratio), dtype=dtype, rngs=rngs)

    def modulations(self, conditioning_bd: jax.Array) -> list[jax.Array]:
        """The `chunks` modulation vectors, [B, D] each."""
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


def with_decoded_states(reports: RoutingReport | None, decode: Callable) -> RoutingReport | None:
    """Adds `trace.decoded` to observed reports [R, T, ...]; decode: tokens [B, N, D] -> images [B, H, W, C'].

    A state is not what the final layer was trained to read, so this shows only what it already holds of the output.
    """
    if reports is None:
        return None
    trace = reports.observed.trace
    trace = trace._replace(decoded=jax.vmap(jax.vmap(decode))(trace.state))  # [R, T, B, H, W, C']
    return reports._replace(observed=reports.observed._replace(trace=trace))
