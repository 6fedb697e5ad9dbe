"""Patches, positions, times and labels against formulas evaluated by hand."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trm_diffusion.models.embed import LabelEmbedder, TimestepEmbedder, patchify, sincos_positions, sinusoid, unpatchify


class PatchTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_patches_are_in_raster_order(self):
        """The 2 x 2 patches of a 4 x 6 image, numbered row by row, are those that one reads off by hand."""
        image = jnp.arange(24.0).reshape(1, 4, 6, 1)
        patches = self.variant(lambda x: patchify(x, 2))(image)
        chex.assert_shape(patches, (1, 6, 4))
        np.testing.assert_array_equal(patches[0, 0], [0, 1, 6, 7])
        np.testing.assert_array_equal(patches[0, 2], [4, 5, 10, 11])
        np.testing.assert_array_equal(patches[0, 3], [12, 13, 18, 19])


@pytest.mark.parametrize(("patch", "height", "width", "channels"), [(1, 3, 3, 2), (2, 4, 4, 1), (4, 8, 16, 3)])
def test_unpatchify_undoes_patchify(patch, height, width, channels):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, channels)), jnp.float32)
    patches = patchify(images, patch)
    chex.assert_shape(patches, (2, height * width // patch**2, patch**2 * channels))
    chex.assert_trees_all_equal(unpatchify(patches, patch, height, width), images)


def test_channels_stay_together_in_a_patch():
    image = jnp.stack([jnp.zeros((2, 2)), jnp.ones((2, 2))], axis=-1)[None]
    np.testing.assert_array_equal(patchify(image, 2)[0, 0], [0, 1] * 4)


def test_positions_by_hand():
    """Width 8: two frequencies, 1 and 1/100; channels are sin, sin, cos, cos of the column, then of the row."""
    table = sincos_positions(8, rows=2, columns=3)
    chex.assert_shape(table, (6, 8))
    assert table.dtype == np.float32

    def encoded(position):
        angles = position * np.array([1.0, 0.01])
        return [*np.sin(angles), *np.cos(angles)]

    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        np.testing.assert_allclose(table[token], [*encoded(column), *encoded(row)], rtol=1e-6)
    assert len(np.unique(table, axis=0)) == 6


def test_sinusoid_by_hand():
    """Four features: frequencies 1 and 1/100, cosines first."""
    times = jnp.array([0.0, 1.0, 250.0, 999.0])
    embedded = sinusoid(times, 4)
    chex.assert_shape(embedded, (4, 4))
    chex.assert_type(embedded, jnp.float32)
    t = np.array([0.0, 1.0, 250.0, 999.0])[:, None]
    expected = np.concatenate([np.cos(t), np.cos(t / 100), np.sin(t), np.sin(t / 100)], axis=1)
    np.testing.assert_allclose(embedded, expected, atol=2e-4)  # float32 angles near 1,000


def test_times_are_embedded_from_integers_and_floats_alike():
    chex.assert_trees_all_equal(sinusoid(jnp.array([3, 7]), 8), sinusoid(jnp.array([3.0, 7.0]), 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_timesteps_have_a_vector_each_in_the_dtype_of_the_computation(dtype):
    embed = TimestepEmbedder(8, dtype=dtype, rngs=nnx.Rngs(0))
    vectors = embed(jnp.array([0.0, 10.0, 999.0]))
    chex.assert_shape(vectors, (3, 8))
    chex.assert_type(vectors, dtype)
    assert len(np.unique(np.asarray(vectors, np.float32), axis=0)) == 3


def test_the_null_label_is_one_more_row_of_the_table():
    embed = LabelEmbedder(10, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    vectors = embed(jnp.arange(11))
    chex.assert_shape(vectors, (11, 8))
    assert len(np.unique(np.asarray(vectors), axis=0)) == 11
    chex.assert_trees_all_equal(vectors, embed.table.embedding[...])
