"""Builds the model that a config describes.

Every model is model(images, times, condition, latent_steps=..., key=...) -> (prediction, routing reports). The
condition of a DiT is a class label [B]. That of an MMDiT is word ids [B, L], or a `Text` if the text is encoded
beforehand.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models import dit, mmdit
from trm_diffusion.models.dit import DiT
from trm_diffusion.models.mmdit import MMDiT, MMDiTConfig
from trm_diffusion.models.settings import setting
from trm_diffusion.models.stack import StackLayout
from trm_diffusion.models.text import TextConfig, TextEncoder
from trm_diffusion.models.transformer import layout_of


@dataclasses.dataclass(frozen=True)
class ModelConfig(MMDiTConfig):
    architecture: str = setting("dit", choices=("dit", "mmdit"))  # conditioned on class labels (dit) or text (mmdit)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)  # mmdit: the text it is conditioned on


class TextToImage(nnx.Module):
    """An MMDiT trained together with its text encoder, conditioned on word ids [B, L]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, **sizes):
        self.text_encoder = TextEncoder(config.text, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.mmdit = _mmdit(config, rngs=rngs, **sizes)

    def __call__(self, images_bhwc: jax.Array, times_b: jax.Array, tokens_bl: jax.Array, **options):
        """See `MMDiT.__call__`."""
        return self.mmdit(images_bhwc, times_b, self.text_encoder(tokens_bl), **options)


def _mmdit(config: ModelConfig, **sizes) -> MMDiT:
    return MMDiT(config, text_features=config.text.features, pooled_features=config.text.pooled_features, **sizes)


def make_network(
    config: ModelConfig, *, image_size: int, in_channels: int, out_channels: int, num_classes: int, rngs: nnx.Rngs
) -> nnx.Module:
    """The model that `config` names, freshly initialised. Only a DiT uses num_classes."""
    sizes = dict(image_size=image_size, in_channels=in_channels, out_channels=out_channels, rngs=rngs)
    if config.architecture == "dit":
        return DiT(config, num_classes=num_classes, **sizes)
    return TextToImage(config, **sizes) if config.text.encoder == "learned" else _mmdit(config, **sizes)


def stack_layout(config: ModelConfig) -> StackLayout:
    """How the model's blocks are stored in its parameters."""
    return layout_of(config, (dit if config.architecture == "dit" else mmdit).block_kinds(config))
