"""The class-conditional diffusion transformer (DiT, arXiv 2212.09748) with recursion in the configured blocks."""

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.embed import LabelEmbedder, TimestepEmbedder, patchify, sincos_positions, unpatchify
from trm_diffusion.models.layers import linear, modulated_norm
from trm_diffusion.models.recursion import Conditioning, RoutingReport, recursive_blocks
from trm_diffusion.models.stack import BlockStack
from trm_diffusion.models.transformer import (
    FinalLayer,
    Stream,
    TransformerConfig,
    loop_of,
    recursion_of,
    with_decoded_states,
)

SIZES = {  # name: depth, width, heads (DiT, table 1)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)


class DiTConfig(TransformerConfig):
    """A DiT has no settings beyond those that all transformers here share."""


def dit_size(name: str) -> dict[str, int]:
    """The config fields of a published size such as "XL/2". Raises a one-line ValueError for an unknown size."""
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCHES):
        raise ValueError(f'model "{name}" is not one of {", ".join(SIZES)} with patch 2, 4 or 8, such as "XL/2"')
    depth, width, heads = SIZES[size]
    return dict(depth=depth, width=width, heads=heads, patch=int(patch))


def block_kinds(config: TransformerConfig) -> list[str]:
    """Of each block: "plain", "recursive" or "looped"."""
    chosen, other = (
        recursive_blocks(config.recursion.blocks, config.depth),
        "looped" if config.recursion.looped else "recursive",
    )
    return [other if index in chosen else "plain" for index in range(config.depth)]


class DiTBlock(Stream):
    """One adaLN-Zero block: x + g1 Attn(Mod(LN(x))), then x + g2 MLP(Mod(LN(x))), with recursion in the attention."""

    def __init__(self, config: TransformerConfig, kind: str, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        # Built last, so that the base weights are the same with and without it.
        self.recursion = recursion_of(config, rngs=rngs) if kind == "recursive" else None

    def __call__(self, x_bnd, *, conditioning: Conditioning, latent_steps=None, key=None, observe=False):
        """[B, N, D] -> [B, N, D] and the block's `RoutingReport` (None without recursion)."""
        shift, scale, *rest = self.modulations(conditioning.vector)
        modulated = modulated_norm(x_bnd, shift, scale)
        if self.recursion is None:
            qkv, report = self.attention.project(modulated), None
        else:
            qkv, report = self.recursion(
                modulated,
                shift_bd=shift,
                scale_bd=scale,
                conditioning=conditioning,
                attention=self.attention,
                latent_steps=latent_steps,
                key=key,
                observe=observe,
            )
        return self.finish(x_bnd, self.attention.attend(qkv), *rest), report


class DiT(nnx.Module):
    """Maps noisy images, times and labels to the network's prediction and the routing reports.

    image_size and in_channels are those of the latents (or pixels) it denoises. out_channels depends on the objective:
    twice in_channels if it also predicts the variance.
    """

    def __init__(
        self,
        config: TransformerConfig,
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
        self.timestep_embed = TimestepEmbedder(width, frequency_shift=config.frequency_shift, dtype=dtype, rngs=rngs)
        self.label_embed = LabelEmbedder(num_classes, width, dtype=dtype, rngs=rngs)
        self.stack = BlockStack(
            lambda kind, key: DiTBlock(config, kind, rngs=nnx.Rngs(key)),
            block_kinds(config),
            scan=config.scan_blocks,
            remat=config.remat,
            rngs=rngs,
            **loop_of(config),
        )
        self.final = FinalLayer(config, out_channels, rngs=rngs)
        self._grid = grid

    def __call__(
        self,
        images_bhwc: jax.Array,
        times_b: jax.Array,
        labels_b: jax.Array,
        *,
        latent_steps: int | jax.Array | None = None,
        key: jax.Array | None = None,
        observe: bool = False,
    ) -> tuple[jax.Array, RoutingReport | None]:
        """[B, H, W, C], times [B] in 0..1000, labels [B] -> float32 [B, H, W, out_channels], reports [R, T, ...].

        R is the number of recursive blocks. `key` is passed only in training; it draws the gates' noise. observe: the
        reports also tell what each latent step does (recursion/observe.py).
        """
        config, size = self.config, self.image_size
        x_bnd = self.patch_embed(patchify(images_bhwc.astype(config.dtype), config.patch))
        x_bnd = x_bnd + sincos_positions(config.width, self._grid, self._grid).astype(config.dtype)[None]
        conditioning = Conditioning(self.timestep_embed(times_b), self.label_embed(labels_b))
        x_bnd, reports = self.stack(
            x_bnd, key=key, conditioning=conditioning, latent_steps=latent_steps, observe=observe
        )

        def decode(x_bnd):
            patches = self.final(x_bnd, conditioning.vector).astype(jnp.float32)
            return unpatchify(patches, config.patch, size, size)

        return decode(x_bnd), with_decoded_states(reports, decode) if observe else reports
