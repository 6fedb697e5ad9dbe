"""Text conditioning: one format for every encoder, and a small encoder that is trained with the model."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.attention import Attention
from trm_diffusion.models.embed import sincos
from trm_diffusion.models.layers import Mlp, layer_norm
from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.models.tokenizer import PAD

CLIP_LENGTH = 77  # tokens per text in the two CLIP encoders of recipe sd3
UNIT_NORMAL = nnx.initializers.normal(1.0)


class Text(NamedTuple):
    """Encoded texts, from any encoder."""

    states: jax.Array  # [B, L, C] one vector per token
    mask: jax.Array  # [B, L] bool, False for padding
    pooled: jax.Array  # [B, P] one vector per text


@dataclasses.dataclass(frozen=True)
class TextConfig(Settings):
    # learned: trained on words with the model; encoded: text encoded beforehand by pretrained encoders
    encoder: str = setting("learned", choices=("learned", "encoded"))
    length: int = setting(32, least=1)  # L, tokens per text; longer texts are truncated
    features: int = setting(128, least=2)  # C, width of a token's state
    pooled_features: int = setting(128, least=1)  # P, width of a text's pooled vector; learned: equal to features
    depth: int = setting(2, least=0)  # learned: transformer blocks
    heads: int = setting(4, least=1)  # learned: attention heads
    vocabulary: int = setting(256, least=4)  # learned: embedding rows, for the data's words and 3 special words
    # encoded: by one pretrained encoder, or sd3 (CLIP, CLIP and T5, put together as in SD3)
    recipe: str = setting("single", choices=("single", "sd3"))
    # encoded: local path or hub id (transformers) of the encoder; sd3: of a pipeline
    pretrained: str = setting("", path=True)
    revision: str = ""  # encoded: branch, tag or commit of the hub id; "" is its default
    # encoded: dtype of the encoders' computation
    pretrained_dtype: str = setting("float32", choices=("float32", "float16", "bfloat16"))


class TextBlock(nnx.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)), over the tokens that are not padding."""

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        self.attention = Attention(config.features, config.heads, qk_norm=False, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(config.features, 4 * config.features, dtype=dtype, rngs=rngs)

    def __call__(self, x_blc: jax.Array, mask_bl: jax.Array) -> jax.Array:
        attended = self.attention.attend(self.attention.project(layer_norm(x_blc)), mask_bn=mask_bl)
        x_blc = x_blc + self.attention.out(attended)
        return x_blc + self.mlp(layer_norm(x_blc))


class TextEncoder(nnx.Module):
    """Word ids [B, L] -> `Text`: a transformer over word vectors of unit scale and fixed sine-cosine positions.

    The pooled vector is the mean state of the tokens that are not padding.
    """

    def __init__(self, config: TextConfig, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.words = nnx.Embed(
            config.vocabulary,
            config.features,
            dtype=dtype,
            embedding_init=UNIT_NORMAL,
            embedding_metadata={"logical_axes": (None, "embed")},
            rngs=rngs,
        )
        self.blocks = nnx.List([TextBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])

    def __call__(self, tokens_bl: jax.Array) -> Text:
        mask = tokens_bl != PAD
        length, features = tokens_bl.shape[1], self.words.features
        x_blc = self.words(tokens_bl) + sincos(range(length), features).astype(self.dtype)[None]
        for block in self.blocks:
            x_blc = block(x_blc, mask)
        states = layer_norm(x_blc)
        weights = mask.astype(self.dtype)[..., None]
        return Text(states, mask, jnp.sum(states * weights, axis=1) / jnp.sum(weights, axis=1))
