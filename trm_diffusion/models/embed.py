"""Into tokens and out again: patches, positions, diffusion timesteps, class labels."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trm_diffusion.models.layers import NORMAL_002, linear

TIMESTEP_FREQUENCIES = 256  # width of the sinusoidal timestep embedding (DiT)


def patchify(images_bhwc: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, patch * patch * C], patches in raster order, pixels of a patch row by row."""
    b, h, w, c = images_bhwc.shape
    x = images_bhwc.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches_bnp: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """[B, N, patch * patch * C] -> [B, height, width, C], the inverse of `patchify`."""
    b, _, p = patches_bnp.shape
    rows, columns, c = height // patch, width // patch, p // (patch * patch)
    x = patches_bnp.reshape(b, rows, columns, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)


def sincos_positions(width: int, rows: int, columns: int) -> np.ndarray:
    """Fixed sine-cosine position table [rows * columns, width], float32 (DiT).

    The first half of the channels encodes the column, the second half the row; each half is [sin, cos] over
    width / 4 frequencies 10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))

    def encode(positions):  # [N] -> [N, width / 2]
        angles = positions[:, None] * frequencies[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def sinusoid(times_b: jax.Array, features: int, max_period: float = 10000.0, frequency_shift: int = 0) -> jax.Array:
    """Sinusoidal embedding of scalar times, [B] -> [B, features] float32, as [cos, sin] halves (DDPM, DiT).

    Frequencies fall from 1 to 1 / max_period; with a frequency_shift of 1 the last one is exactly that.
    """
    half = features // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift)
    frequencies = jnp.exp(-np.log(max_period) * exponents)  # [half]
    angles = times_b.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
    """Diffusion timestep [B] (0..1000) -> [B, D]: sinusoid, then a two-layer MLP with SiLU."""

    def __init__(self, width: int, *, frequency_shift: int = 0, dtype, rngs: nnx.Rngs):
        self.dtype, self.frequency_shift = dtype, frequency_shift
        self.first = linear(TIMESTEP_FREQUENCIES, width, axes=(None, "embed"), init=NORMAL_002, dtype=dtype, rngs=rngs)
        self.second = linear(width, width, axes=("embed", None), init=NORMAL_002, dtype=dtype, rngs=rngs)

    def __call__(self, times_b: jax.Array) -> jax.Array:
        x = sinusoid(times_b, TIMESTEP_FREQUENCIES, frequency_shift=self.frequency_shift).astype(self.dtype)
        return self.second(jax.nn.silu(self.first(x)))


class LabelEmbedder(nnx.Module):
    """Class label [B] int -> [B, D]. Label `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.null_label = num_classes
        self.table = nnx.Embed(
            num_classes + 1,
            width,
            dtype=dtype,
            embedding_init=NORMAL_002,
            embedding_metadata={"logical_axes": (None, "embed")},
            rngs=rngs,
        )

    def __call__(self, labels_b: jax.Array) -> jax.Array:
        return self.table(labels_b)
