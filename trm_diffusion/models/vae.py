"""The convolutional autoencoder (AutoencoderKL, arXiv 2112.10752) of Stable Diffusion and Stable Diffusion 3.

Images are [B, H, W, 3] in [-1, 1], latents [B, H / f, W / f, C], channels last, f = 2^(levels - 1). Group norms and the
softmax run in float32. Parameters are named after the published layout.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trm_diffusion.models.latent import LatentSpec

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    channels: tuple = (128, 256, 512, 512)  # features per level, finest first; each further level halves the image
    blocks: int = 2  # residual blocks per level in the encoder; the decoder has one more
    image_channels: int = 3
    latent_channels: int = 4
    groups: int = 32  # groups of channels in each group norm
    quant_conv: bool = True  # 1x1 convolutions around the latents; SD3 has none
    scale: float = 0.18215  # see LatentSpec
    shift: float = 0.0
    dtype: str = "float32"  # dtype of the computation

    @property
    def factor(self) -> int:
        """f, the side of a latent cell in pixels."""
        return 2 ** (len(self.channels) - 1)

    def latent_spec(self, vae_id: str, image_size: int) -> LatentSpec:
        return LatentSpec(vae_id, self.scale, self.shift, self.latent_channels, image_size // self.factor)


SD = VAEConfig()
SD3 = VAEConfig(latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609)


class GroupNorm(nnx.GroupNorm):
    """Group norm over groups of channels and all positions, computed in float32, returned in x's dtype."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(features, groups, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(x.dtype)


def conv(features: int, out: int, kernel: int = 3, *, config: VAEConfig, rngs: nnx.Rngs, **options) -> nnx.Conv:
    return nnx.Conv(features, out, (kernel, kernel), dtype=jnp.dtype(config.dtype), rngs=rngs, **options)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where the features change."""

    def __init__(self, features: int, out: int, *, config: VAEConfig, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(features, config.groups, rngs=rngs)
        self.conv1 = conv(features, out, config=config, rngs=rngs)
        self.norm2 = GroupNorm(out, config.groups, rngs=rngs)
        self.conv2 = conv(out, out, config=config, rngs=rngs)
        self.shortcut = None if features == out else conv(features, out, 1, config=config, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x_bhwc)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x_bhwc if self.shortcut is None else self.shortcut(x_bhwc))


class SpatialAttention(nnx.Module):
    """x + attention over all positions, with one head as wide as the features."""

    def __init__(self, features: int, *, config: VAEConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm = GroupNorm(features, config.groups, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        b, h, w, c = x_bhwc.shape
        qkv = self.qkv(self.norm(x_bhwc)).reshape(b, h * w, 3, 1, c)
        attended = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # [B, HW, 1, C]
        return x_bhwc + self.out(attended.reshape(b, h, w, c))


class Middle(nnx.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, features: int, *, config: VAEConfig, rngs: nnx.Rngs):
        self.first = ResidualBlock(features, features, config=config, rngs=rngs)
        self.attention = SpatialAttention(features, config=config, rngs=rngs)
        self.second = ResidualBlock(features, features, config=config, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.second(self.attention(self.first(x_bhwc)))


class Level(nnx.Module):
    """Residual blocks at one resolution, then `resample`, if given, to the next resolution."""

    def __init__(self, features: int, out: int, blocks: int, resample, *, config: VAEConfig, rngs: nnx.Rngs):
        widths = [features] + [out] * blocks
        self.blocks = nnx.List(
            [ResidualBlock(a, b, config=config, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)]
        )
        self.resample = None if resample is None else resample(out, config=config, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        for block in self.blocks:
            x_bhwc = block(x_bhwc)
        return x_bhwc if self.resample is None else self.resample(x_bhwc)


class Downsample(nnx.Module):
    """[B, H, W, C] -> [B, H / 2, W / 2, C]; only the lower and right edges are padded."""

    def __init__(self, features: int, *, config: VAEConfig, rngs: nnx.Rngs):
        self.conv = conv(features, features, strides=2, padding=((0, 1), (0, 1)), config=config, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.conv(x_bhwc)


class Upsample(nnx.Module):
    """[B, H, W, C] -> [B, 2 H, 2 W, C]: nearest-neighbour upsampling, then a convolution."""

    def __init__(self, features: int, *, config: VAEConfig, rngs: nnx.Rngs):
        self.conv = conv(features, features, config=config, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.conv(jnp.repeat(jnp.repeat(x_bhwc, 2, axis=1), 2, axis=2))


class Encoder(nnx.Module):
    """[B, H, W, image channels] -> [B, H / f, W / f, 2 C]: mean and log-variance."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, last = config.channels, len(config.channels) - 1
        self.conv_in = conv(config.image_channels, widths[0], config=config, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(0, i - 1)],
                    widths[i],
                    config.blocks,
                    Downsample if i < last else None,
                    config=config,
                    rngs=rngs,
                )
                for i in range(len(widths))
            ]
        )
        self.middle = Middle(widths[-1], config=config, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], config.groups, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, config=config, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = self.conv_in(x_bhwc)
        for level in self.levels:
            x_bhwc = level(x_bhwc)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x_bhwc))))


class Decoder(nnx.Module):
    """[B, H / f, W / f, C] -> [B, H, W, image channels]; its levels go from coarse to fine."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = conv(config.latent_channels, widths[0], config=config, rngs=rngs)
        self.middle = Middle(widths[0], config=config, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(0, i - 1)],
                    widths[i],
                    config.blocks + 1,
                    Upsample if i < last else None,
                    config=config,
                    rngs=rngs,
                )
                for i in range(len(widths))
            ]
        )
        self.norm_out = GroupNorm(widths[-1], config.groups, rngs=rngs)
        self.conv_out = conv(widths[-1], config.image_channels, config=config, rngs=rngs)

    def __call__(self, z_bhwc: jax.Array) -> jax.Array:
        x_bhwc = self.middle(self.conv_in(z_bhwc))
        for level in self.levels:
            x_bhwc = level(x_bhwc)
        return self.conv_out(jax.nn.silu(self.norm_out(x_bhwc)))


class VAE(nnx.Module):
    """The autoencoder. Its latents are not normalised; a `LatentSpec` normalises them for a diffusion model."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config, rngs=rngs), Decoder(config, rngs=rngs)
        quant = config.quant_conv
        self.quant_conv = conv(2 * channels, 2 * channels, 1, config=config, rngs=rngs) if quant else None
        self.post_quant_conv = conv(channels, channels, 1, config=config, rngs=rngs) if quant else None

    def encode(self, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the posterior, [B, H / f, W / f, C] float32 each."""
        moments = self.encoder(images_bhwc.astype(self.config.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def decode(self, latents_bhwc: jax.Array) -> jax.Array:
        """[B, H / f, W / f, C] -> images [B, H, W, image channels] float32, not clipped."""
        z = latents_bhwc.astype(self.config.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array], latents_bhwc: np.ndarray, *, tile: int = 64, overlap: int = 16
) -> np.ndarray:
    """Decodes large latents tile by tile, so that memory does not grow with the image; float32 [B, H, W, channels].

    decode: maps latents to images, such as a jitted `VAE.decode`. All tiles have one shape, at most `tile` cells per
    side. Neighbours share at least `overlap` cells, over which they are blended linearly. Group norms and attention see
    one tile at a time, so the result equals `decode` of the whole exactly only if a single tile covers it.
    """
    rows, columns = latents_bhwc.shape[1:3]
    height, width = min(tile, rows), min(tile, columns)
    image = total = None
    for top in _starts(rows, height, overlap):
        for left in _starts(columns, width, overlap):
            decoded = np.asarray(decode(latents_bhwc[:, top : top + height, left : left + width]))
            factor = decoded.shape[1] // height
            if image is None:
                image = np.zeros((decoded.shape[0], rows * factor, columns * factor, decoded.shape[3]), np.float32)
                total = np.zeros((*image.shape[1:3], 1), np.float32)
                fade = _fade(height * factor, overlap * factor)[:, None] * _fade(width * factor, overlap * factor)
            down = slice(top * factor, (top + height) * factor)
            across = slice(left * factor, (left + width) * factor)
            image[:, down, across] += decoded * fade[..., None]
            total[down, across] += fade[..., None]
    return image / total


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Start of each tile, so that the tiles cover `length` and neighbours share at least `overlap`."""
    return [*range(0, length - tile, max(1, tile - overlap)), length - tile]


def _fade(length: int, overlap: int) -> np.ndarray:
    """Blending weights of a tile along one side, [length]: 1 inside, nearly 0 at its edges."""
    inside = np.arange(length) + 0.5
    return np.minimum(1.0, np.minimum(inside, length - inside) / max(1, overlap)).astype(np.float32)
