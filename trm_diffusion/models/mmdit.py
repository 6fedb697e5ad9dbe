"""The text-to-image diffusion transformer of Stable Diffusion 3 (MMDiT, arXiv 2403.03206), with recursion.

Visual and text tokens are two streams with their own weights that attend jointly. In recursive blocks, the visual
q, k, v go through latent steps over the text's keys and values, which are computed once; the text's queries take part
only in the block's own attention. The arithmetic is SD3's. Shift comes before scale everywhere, as published; the
diffusers library has scale first in the final layer and in the last block's text.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.attention import Context
from trm_diffusion.models.embed import (
    TimestepEmbedder,
    VectorEmbedder,
    cropped_sincos_positions,
    patchify,
    unpatchify,
)
from trm_diffusion.models.layers import linear, modulated_norm
from trm_diffusion.models.recursion import Conditioning, RoutingReport, recursive_blocks
from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.models.stack import BlockStack
from trm_diffusion.models.text import Text
from trm_diffusion.models.transformer import (
    FinalLayer,
    Stream,
    TransformerConfig,
    attention_of,
    loop_of,
    recursion_of,
    with_decoded_states,
)


@dataclasses.dataclass(frozen=True)
class JointConfig(Settings):
    """Settings of an MMDiT beyond those that all transformers here share; the defaults are SD3-medium's."""

    # number of blocks, from the first, that have a second attention, over visual tokens only (SD3.5)
    dual_attention_blocks: int = setting(0, least=0)
    position_max_size: int = setting(192, least=1)  # rows and columns of the position table, cropped at its centre
    position_base_size: int = setting(64, least=1)  # the table's positions go from 0 to this
    mask_padding: bool = False  # mask padding in the attention; SD3 attends to it


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(TransformerConfig):
    mmdit: JointConfig = dataclasses.field(default_factory=JointConfig)


SD3_MEDIUM = dict(depth=24, width=1536, heads=24, patch=2)  # fields of `TransformerConfig`


class BlockKind(NamedTuple):
    """What distinguishes a block from the others in the stack."""

    recursive: bool
    dual: bool  # a second attention, over visual tokens only
    last: bool  # the text stream ends here: it is attended to, and not updated
    looped: bool = False  # in the loop (models/recursion/looped.py)


def block_kinds(config: MMDiTConfig) -> list[BlockKind]:
    chosen, looped = recursive_blocks(config.recursion.blocks, config.depth), config.recursion.looped
    return [
        BlockKind(
            recursive=index in chosen and not looped,
            dual=index < config.mmdit.dual_attention_blocks,
            last=index == config.depth - 1,
            looped=index in chosen and looped,
        )
        for index in range(config.depth)
    ]


class MMDiTBlock(nnx.Module):
    """Two adaLN-Zero streams under one attention, with recursion in the visual q, k, v.

    The last block's text projection includes the published query weights, although nothing reads them.
    """

    def __init__(self, config: MMDiTConfig, kind: BlockKind, *, rngs: nnx.Rngs):
        self.kind = kind
        self.visual = Stream(config, chunks=9 if kind.dual else 6, rngs=rngs)
        self.text = Stream(config, chunks=2 if kind.last else 6, rngs=rngs)
        self.dual = attention_of(config, rngs=rngs) if kind.dual else None
        # Built last, so that the base weights are the same with and without it.
        self.recursion = recursion_of(config, rngs=rngs) if kind.recursive else None

    def __call__(
        self, tokens, *, conditioning: Conditioning, text_mask=None, latent_steps=None, key=None, observe=False
    ):
        """(visual [B, N, D], text [B, L, D]) -> the same, and the block's `RoutingReport` (None without recursion)."""
        x_bnd, text_bld = tokens
        shift, scale, *rest = self.visual.modulations(conditioning.vector)
        text_shift, text_scale, *text_rest = self.text.modulations(conditioning.vector)

        text_qkv = self.text.attention.project(modulated_norm(text_bld, text_shift, text_scale))
        text_queries, text_keys, text_values = self.text.attention.normalized_heads(text_qkv)
        context = Context(text_keys, text_values, text_mask)
        attention = self.visual.attention
        modulated = modulated_norm(x_bnd, shift, scale)
        if self.recursion is None:
            qkv, report = attention.project(modulated), None
        else:
            qkv, report = self.recursion(
                modulated,
                shift_bd=shift,
                scale_bd=scale,
                conditioning=conditioning,
                attention=attention,
                context=context,
                latent_steps=latent_steps,
                key=key,
                observe=observe,
            )
        attended = attention.attend(qkv, context, queries=None if self.kind.last else text_queries)
        attended, text_attended = jnp.split(attended, [x_bnd.shape[1]], axis=1)
        if self.kind.dual:
            rest, (dual_shift, dual_scale, dual_gate) = rest[:4], rest[4:]
            second = self.dual.attend(self.dual.project(modulated_norm(x_bnd, dual_shift, dual_scale)))
            x_bnd = x_bnd + dual_gate[:, None, :] * self.dual.out(second)
        x_bnd = self.visual.finish(x_bnd, attended, *rest)
        if not self.kind.last:
            text_bld = self.text.finish(text_bld, text_attended, *text_rest)
        return (x_bnd, text_bld), report


class MMDiT(nnx.Module):
    """Maps noisy images, times and encoded text to the network's prediction and the routing reports.

    image_size and in_channels are those of the latents (or pixels) it denoises. out_channels depends on the objective.
    text_features and pooled_features are C and P of its `Text`.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        text_features: int,
        pooled_features: int,
        rngs: nnx.Rngs,
    ):
        dtype, width = jnp.dtype(config.dtype), config.width
        self.config, self.image_size = config, image_size
        self.patch_embed = linear(config.patch**2 * in_channels, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.timestep_embed = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.pooled_embed = VectorEmbedder(pooled_features, width, dtype=dtype, rngs=rngs)
        self.context_embed = linear(text_features, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.stack = BlockStack(
            lambda kind, key: MMDiTBlock(config, kind, rngs=nnx.Rngs(key)),
            block_kinds(config),
            scan=config.scan_blocks,
            remat=config.remat,
            rngs=rngs,
            **loop_of(config),
        )
        self.final = FinalLayer(config, out_channels, rngs=rngs)

    def __call__(
        self,
        images_bhwc: jax.Array,
        times_b: jax.Array,
        text: Text,
        *,
        latent_steps: int | jax.Array | None = None,
        key: jax.Array | None = None,
        observe: bool = False,
    ) -> tuple[jax.Array, RoutingReport | None]:
        """[B, H, W, C], times [B] in 0..1000, text -> float32 [B, H, W, out_channels], reports [R, T, ...].

        R is the number of recursive blocks. `key` is passed only in training; it draws the gates' noise. observe: the
        reports also tell what each latent step does (recursion/observe.py).
        """
        config, size = self.config, self.image_size
        x_bnd = self.patch_embed(patchify(images_bhwc.astype(config.dtype), config.patch))
        x_bnd = x_bnd + self.positions().astype(config.dtype)[None]
        text_bld = self.context_embed(text.states.astype(config.dtype))
        conditioning = Conditioning(self.timestep_embed(times_b), self.pooled_embed(text.pooled))
        (x_bnd, _), reports = self.stack(
            (x_bnd, text_bld),
            key=key,
            conditioning=conditioning,
            text_mask=text.mask if config.mmdit.mask_padding else None,
            latent_steps=latent_steps,
            observe=observe,
        )

        def decode(x_bnd):
            patches = self.final(x_bnd, conditioning.vector).astype(jnp.float32)
            return unpatchify(patches, config.patch, size, size)

        return decode(x_bnd), with_decoded_states(reports, decode) if observe else reports

    def positions(self):
        """The fixed position table for this image size, [N, D] float32."""
        grid, joint = self.image_size // self.config.patch, self.config.mmdit
        return cropped_sincos_positions(
            self.config.width, grid, grid, max_size=joint.position_max_size, base_size=joint.position_base_size
        )
