"""Which model a config describes, and how to build it.

Every model is model(images, times, condition, latent_steps=..., key=...) -> (prediction, routing reports). Its
condition is a class label [B] for a DiT, and for an MMDiT word ids [B, L] or, of text encoded before, a `Text`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trm_diffusion.models import dit, mmdit
from trm_diffusion.models.dit import DiT
from trm_diffusion.models.mmdit import MMDiT, MMDiTConfig
from trm_diffusion.models.stack import StackLayout
from trm_diffusion.models.text import Text, TextConfig, TextEncoder
from trm_diffusion.models.tokenizer import null_tokens
from trm_diffusion.models.transformer import layout_of

ARCHITECTURES = ("dit", "mmdit")


@dataclasses.dataclass(frozen=True)
class ModelConfig(MMDiTConfig):
    architecture: str = "dit"  # dit (class labels) or mmdit (text)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)  # mmdit: the text it is conditioned on

    @property
    def reads_words(self) -> bool:
        """Is it conditioned on word ids?"""
        return self.architecture == "mmdit" and self.text.encoder == "learned"


class TextToImage(nnx.Module):
    """An MMDiT and the encoder of its text, trained together; conditioned on word ids [B, L]."""

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
    """The model that `config` names, with fresh weights; num_classes is a DiT's alone."""
    sizes = dict(image_size=image_size, in_channels=in_channels, out_channels=out_channels, rngs=rngs)
    if config.architecture == "dit":
        return DiT(config, num_classes=num_classes, **sizes)
    return TextToImage(config, **sizes) if config.reads_words else _mmdit(config, **sizes)


def null_condition(config: ModelConfig, num_classes: int):
    """One image's condition that stands for none in classifier-free guidance; arrays without the batch axis."""
    text = config.text
    if config.architecture == "dit":
        return np.asarray(num_classes, np.int32)
    if config.reads_words:
        return null_tokens(text.length)
    states, pooled = (text.length, text.features), (text.pooled_features,)
    return Text(np.zeros(states, np.float32), np.ones(text.length, bool), np.zeros(pooled, np.float32))


def stack_layout(config: ModelConfig) -> StackLayout:
    """How the blocks lie in the parameters."""
    return layout_of(config, (dit if config.architecture == "dit" else mmdit).block_kinds(config))
