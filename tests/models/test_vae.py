"""The autoencoder's shapes and float32 parts, and decoding by tiles; parity with PyTorch is in tests/parity."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.vae import SD, SD3, VAE, GroupNorm, VAEConfig, decode_tiled

TINY = VAEConfig(channels=(4, 8), blocks=1, groups=2, latent_channels=4)


def doubled(latents):
    """A decoder that looks at one cell at a time."""
    return np.repeat(np.repeat(3.0 * latents - 1.0, 2, axis=1), 2, axis=2)


@pytest.mark.parametrize("shape", [(8, 8), (5, 8), (20, 13), (9, 31)])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_tiles_of_a_pointwise_decoder_make_the_whole(shape, overlap):
    latents = np.random.default_rng(0).standard_normal((2, *shape, 3)).astype(np.float32)
    seen = []

    def decode(tile):
        seen.append(tile.shape)
        return doubled(tile)

    tiled = decode_tiled(decode, latents, tile=8, overlap=overlap)
    np.testing.assert_allclose(tiled, doubled(latents), rtol=1e-5, atol=1e-6)
    assert set(seen) == {(2, min(8, shape[0]), min(8, shape[1]), 3)}


def test_neighbouring_tiles_fade_into_each_other():
    """Tiles that disagree: the image goes from one's value to the other's in equal steps over the overlap."""
    values = iter([0.0, 1.0])
    tiled = decode_tiled(lambda tile: np.full((1, 8, 8, 1), next(values)), np.zeros((1, 8, 12, 1)), tile=8, overlap=4)
    np.testing.assert_allclose(tiled[0, 0, :, 0], [0] * 4 + [0.125, 0.375, 0.625, 0.875] + [1] * 4, atol=1e-6)


@pytest.mark.parametrize("quant_conv", [True, False])
def test_shapes_and_one_tile_is_the_whole(quant_conv):
    config = VAEConfig(**vars(TINY) | {"quant_conv": quant_conv})
    vae = VAE(config, rngs=nnx.Rngs(0))
    mean, std = vae.encode(jnp.zeros((2, 8, 12, 3)))
    chex.assert_shape([mean, std], (2, 4, 6, 4))
    assert jnp.all(std > 0)
    whole = vae.decode(mean)
    chex.assert_shape(whole, (2, 8, 12, 3))
    np.testing.assert_array_equal(decode_tiled(vae.decode, np.asarray(mean), tile=6), whole)


def test_group_norm_is_float32_inside():
    x = 300.0 + jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
    norm = GroupNorm(4, 2, rngs=nnx.Rngs(0))
    half = norm(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    expected = norm(x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=2**-8)


def test_latent_specs():
    assert SD.latent_spec("sd", 256) == LatentSpec("sd", 0.18215, 0.0, 4, 32)
    spec = SD3.latent_spec("sd3", 1024)
    assert spec == LatentSpec("sd3", 1.5305, 0.0609, 16, 128)
    np.testing.assert_allclose(spec.denormalize(spec.normalize(np.float64(0.7))), 0.7)
    np.testing.assert_allclose(spec.normalize(0.0609 + 1), 1.5305)
