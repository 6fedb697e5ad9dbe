"""Improved precision and recall (Kynkaanniemi et al., 2019): are the samples realistic, and is the reference covered?

Each image is the centre of a ball that reaches to its k-th nearest neighbour in its own set, itself excluded. Precision
is the share of samples inside a ball of the reference; recall is the share of the reference inside a ball of the
samples. Distances are squared, and balls include their border.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NEIGHBOURS = 3
BLOCK_ROWS = 512  # by 50,000 columns: 100 MB of distances at a time


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, neighbours: int = NEIGHBOURS, dtype=jnp.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples [N, D] lie within the reference [M, D] (bool [N]) and the reverse (bool [M]).

    Precision and recall are their means. `dtype` is that of the features, their products and the distances. The ADM
    reference implementation first tries float16, whose largest value is 65,504.

    Raises:
      ValueError: a set of at most `neighbours` images, or distances that are not finite in `dtype`.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} {name} are too few: each needs {neighbours} neighbours")
    samples, reference = jnp.asarray(samples, dtype), jnp.asarray(reference, dtype)
    within_reference = covered(samples, reference, ball_radii(reference, neighbours))
    within_samples = covered(reference, samples, ball_radii(samples, neighbours))
    return within_reference, within_samples


def ball_radii(features: jax.Array, neighbours: int) -> jax.Array:
    """Squared distance [N] from each of features [N, D] to its k-th nearest neighbour, itself excluded."""
    blocks = [_nearest_others(rows, first, features, neighbours) for first, rows in _row_blocks(features)]
    radii = jnp.concatenate(blocks)[: len(features)]
    if not jnp.isfinite(radii).all():
        raise ValueError(f"squared distances overflow {features.dtype}; use float32")
    return radii


def covered(points: jax.Array, centres: jax.Array, radii: jax.Array) -> np.ndarray:
    """Which of points [N, D] lie within a ball around centres [M, D] of squared radii [M]; bool [N]."""
    blocks = [_within_any(rows, centres, radii) for _, rows in _row_blocks(points)]
    return np.concatenate(blocks)[: len(points)]


def _row_blocks(features: jax.Array):
    """Yields (first row, rows [BLOCK_ROWS, D]) over all rows; the last block is padded with zeros."""
    size = min(BLOCK_ROWS, len(features))
    for first in range(0, len(features), size):
        rows = features[first : first + size]
        yield first, jnp.pad(rows, ((0, size - len(rows)), (0, 0)))


@functools.partial(jax.jit, static_argnums=3)
def _nearest_others(rows: jax.Array, first: int, features: jax.Array, neighbours: int) -> jax.Array:
    is_itself = (first + jnp.arange(len(rows)))[:, None] == jnp.arange(len(features))[None]
    distances = jnp.where(is_itself, jnp.inf, squared_distances(rows, features))
    nearest, _ = lax.top_k(-distances, neighbours)
    return -nearest[:, -1]


@jax.jit
def _within_any(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    return (squared_distances(rows, centres) <= radii[None]).any(axis=1)


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """[N, D], [M, D] -> [N, M], |a|^2 - 2 a b + |b|^2, never below 0."""
    products = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    squares_a, squares_b = ((x * x).sum(axis=1) for x in (a, b))
    return jnp.maximum(squares_a[:, None] - 2 * products + squares_b[None], 0)
