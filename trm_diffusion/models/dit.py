"""The class-conditional diffusion transformer (DiT, arXiv 2212.09748) with recursion in the blocks that are named."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.attention import Attention
from trm_diffusion.models.embed import LabelEmbedder, TimestepEmbedder, patchify, sincos_positions, unpatchify
from trm_diffusion.models.gate import Conditioning
from trm_diffusion.models.layers import ZEROS, Mlp, layer_norm, linear, modulate
from trm_diffusion.models.recursion import Recursion, RecursionConfig, RoutingReport, recursive_blocks
from trm_diffusion.models.stack import BlockStack, StackLayout, segment_lengths

SIZES = {  # name: depth, width, heads (DiT, table 1)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    depth: int = 28  # transformer blocks
    width: int = 1152  # D, features of a token
    heads: int = 16  # H, attention heads
    patch: int = 2  # pixels (or latent cells) a side of one token
    mlp_ratio: float = 4.0  # hidden width of the MLP over D
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    dtype: str = "bfloat16"  # of the computation; parameters, norms, softmax and gate are float32
    scan_blocks: bool = True  # run equal blocks under one scan (compiles once); False unrolls them
    remat: str = "none"  # what the backward pass of a block keeps: none, dots, full
    recursion: RecursionConfig = dataclasses.field(default_factory=RecursionConfig)


def dit_size(name: str) -> dict[str, int]:
    """The fields of a published size such as "XL/2". Raises ValueError with one clear line."""
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCHES):
        raise ValueError(f'model "{name}" is not one of {", ".join(SIZES)} with patch 2, 4 or 8, such as "XL/2"')
    depth, width, heads = SIZES[size]
    return dict(depth=depth, width=width, heads=heads, patch=int(patch))


def stack_layout(config: DiTConfig) -> StackLayout:
    """How the blocks lie in the parameters."""
    recursive = recursive_blocks(config.recursion.blocks, config.depth)
    return StackLayout(
        tuple(segment_lengths(config.depth, recursive, config.scan_blocks)), recursive, config.scan_blocks
    )


class DiTBlock(nnx.Module):
    """One adaLN-Zero block: x + g1 Attn(Mod(LN(x))), then x + g2 MLP(Mod(LN(x))), with recursion in the attention."""

    def __init__(self, config: DiTConfig, recursive: bool, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        width = config.width
        self.modulation = linear(width, 6 * width, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, config.heads, qk_norm=config.qk_norm, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), dtype=dtype, rngs=rngs)
        # Built last, so that the base weights are the same with and without it.
        self.recursion = Recursion(width, config.heads, config.recursion, dtype=dtype, rngs=rngs) if recursive else None

    def __call__(self, x_bnd, *, conditioning: Conditioning, latent_steps=None, key=None):
        """[B, N, D] -> [B, N, D] and the block's `RoutingReport`, None without recursion."""
        vector = self.modulation(jax.nn.silu(conditioning.vector))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(vector, 6, axis=-1)  # [B, D] each

        modulated = modulate(layer_norm(x_bnd), shift_1, scale_1)
        if self.recursion is None:
            qkv, report = self.attention.project(modulated), None
        else:
            update, base_input, report = self.recursion(
                modulated,
                shift_bd=shift_1,
                scale_bd=scale_1,
                conditioning=conditioning,
                attend=self.attention.attend,
                project_base=self.attention.project,
                latent_steps=latent_steps,
                key=key,
            )
            qkv = self.attention.project(base_input, update)
        attended = self.attention.out(self.attention.attend(qkv))
        x_bnd = x_bnd + gate_1[:, None, :] * attended
        hidden = self.mlp(modulate(layer_norm(x_bnd), shift_2, scale_2))
        return x_bnd + gate_2[:, None, :] * hidden, report


class FinalLayer(nnx.Module):
    """adaLN and a zero-initialised linear map from tokens to patches, [B, N, D] -> [B, N, patch^2 * C]."""

    def __init__(self, config: DiTConfig, out_channels: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        width, patch_features = config.width, config.patch**2 * out_channels
        self.modulation = linear(width, 2 * width, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)
        self.out = linear(width, patch_features, axes=("embed", None), init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, x_bnd, conditioning_bd):
        shift, scale = jnp.split(self.modulation(jax.nn.silu(conditioning_bd)), 2, axis=-1)
        return self.out(modulate(layer_norm(x_bnd), shift, scale))


class DiT(nnx.Module):
    """Noisy images, times and labels in; the network's prediction and the routing report out.

    image_size and in_channels are those of the latents (or pixels) it denoises; out_channels is the objective's, twice
    in_channels where it also predicts the variance.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.dtype)
        self.config, self.image_size = config, image_size
        width, grid = config.width, image_size // config.patch
        self.patch_embed = linear(config.patch**2 * in_channels, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.timestep_embed = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.label_embed = LabelEmbedder(num_classes, width, dtype=dtype, rngs=rngs)
        self.stack = BlockStack(
            lambda recursive, key: DiTBlock(config, recursive, rngs=nnx.Rngs(key)),
            config.depth,
            recursive_blocks(config.recursion.blocks, config.depth),
            scan=config.scan_blocks,
            remat=config.remat,
            rngs=rngs,
        )
        self.final = FinalLayer(config, out_channels, rngs=rngs)
        self._grid = grid

    @property
    def null_label(self) -> int:
        """The label that stands for no condition in classifier-free guidance."""
        return self.label_embed.null_label

    def __call__(
        self,
        images_bhwc: jax.Array,
        times_b: jax.Array,
        labels_b: jax.Array,
        *,
        latent_steps: int | jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingReport | None]:
        """[B, H, W, C], times [B] in 0..1000, labels [B] -> float32 [B, H, W, out_channels], reports [R, T, ...].

        R counts the recursive blocks. `key` is given in training alone: it draws the gates' noise.
        """
        config, size = self.config, self.image_size
        x_bnd = self.patch_embed(patchify(images_bhwc.astype(config.dtype), config.patch))
        x_bnd = x_bnd + sincos_positions(config.width, self._grid, self._grid).astype(config.dtype)[None]
        conditioning = Conditioning(self.timestep_embed(times_b), self.label_embed(labels_b))
        x_bnd, reports = self.stack(x_bnd, key=key, conditioning=conditioning, latent_steps=latent_steps)
        patches = self.final(x_bnd, conditioning.vector).astype(jnp.float32)
        return unpatchify(patches, config.patch, size, size), reports
