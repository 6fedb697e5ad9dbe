"""Patches to tokens and back, and embeddings of positions, diffusion timesteps, class labels and pooled text."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trm_diffusion.models.layers import NORMAL_002, linear
from trm_diffusion.models.partition import lay

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


def sincos(positions: np.ndarray, features: int) -> np.ndarray:
    """Positions [N] -> [N, features] float32: [sin, cos] over the frequencies 10000^(-i / (features / 2))."""
    frequencies = 10000.0 ** (-np.arange(features // 2) / (features // 2))
    angles = np.asarray(positions)[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_positions(width: int, rows: int, columns: int) -> np.ndarray:
    """Fixed position table [rows * columns, width] float32: half the channels for columns, half for rows (DiT)."""
    return _grid_positions(width, np.arange(rows), np.arange(columns))


def cropped_sincos_positions(width: int, rows: int, columns: int, *, max_size: int, base_size: int) -> np.ndarray:
    """The central rows x columns of a max_size x max_size position table, [rows * columns, width] float32 (SD3).

    The whole table's positions go from 0 to base_size in steps of base_size / max_size. So one table serves every
    resolution, and the centre of an image keeps its position.
    """
    positions = np.arange(max_size) * (base_size / max_size)
    top, left = (max_size - rows) // 2, (max_size - columns) // 2
    return _grid_positions(width, positions[top : top + rows], positions[left : left + columns])


def _grid_positions(width: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    column, row = np.meshgrid(columns, rows)
    return np.concatenate([sincos(column.ravel(), width // 2), sincos(row.ravel(), width // 2)], axis=1)


def sinusoid(times_b: jax.Array, features: int, max_period: float = 10000.0, frequency_shift: int = 0) -> jax.Array:
    """Sinusoidal embedding of scalar times, [B] -> [B, features] float32, as [cos, sin] halves (DDPM, DiT).

    Frequencies fall from 1 towards 1 / max_period; with a frequency_shift of 1 the last one is exactly 1 / max_period.
    """
    half = features // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift)
    frequencies = jnp.exp(-np.log(max_period) * exponents)  # [half]
    angles = times_b.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class VectorEmbedder(nnx.Module):
    """[B, features] -> [B, D]: a two-layer MLP with SiLU."""

    def __init__(self, features: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.first = linear(features, width, axes=(None, "embed"), init=NORMAL_002, dtype=dtype, rngs=rngs)
        self.second = linear(width, width, axes=("embed", None), init=NORMAL_002, dtype=dtype, rngs=rngs)

    def __call__(self, vectors_bf: jax.Array) -> jax.Array:
        return lay(self.second(jax.nn.silu(self.first(vectors_bf.astype(self.dtype)))), "batch")


class TimestepEmbedder(VectorEmbedder):
    """Diffusion timestep [B] (0..1000) -> [B, D]: sinusoid, then the MLP."""

    def __init__(self, width: int, *, frequency_shift: int = 0, dtype, rngs: nnx.Rngs):
        super().__init__(TIMESTEP_FREQUENCIES, width, dtype=dtype, rngs=rngs)
        self.frequency_shift = frequency_shift

    def __call__(self, times_b: jax.Array) -> jax.Array:
        return super().__call__(sinusoid(times_b, TIMESTEP_FREQUENCIES, frequency_shift=self.frequency_shift))


class LabelEmbedder(nnx.Module):
    """Class label [B] int -> [B, D]. Label `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.table = nnx.Embed(
            num_classes + 1,
            width,
            dtype=dtype,
            embedding_init=NORMAL_002,
            embedding_metadata={"logical_axes": (None, "embed")},
            rngs=rngs,
        )

    def __call__(self, labels_b: jax.Array) -> jax.Array:
        return lay(self.table(labels_b), "batch")
