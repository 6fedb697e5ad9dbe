"""Our autoencoders equal diffusers' with weights from the same file, in each layout, and are exported to it again."""

import shutil

import diffusers
import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from tests.parity.common import assert_parity, channels_last, converted, randomize
from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.weights.store import load_vae

KINDS = {  # the two kinds at tiny widths: three levels, one of which keeps its width
    "sd": dict(latent_channels=4, scaling_factor=0.18215),
    "sd3": dict(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    ),
}


def autoencoder(kind):
    widths = (8, 16, 16)
    return randomize(
        diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            layers_per_block=2,
            norm_num_groups=4,
            **KINDS[kind],
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_layout(kind, tmp_path):
    theirs = autoencoder(kind)
    converted(theirs, tmp_path, "diffusers-vae")
    vae, spec = load_vae(tmp_path / "ours", latent_size=6)
    assert (spec.scale, spec.shift) == (theirs.config.scaling_factor, theirs.config.shift_factor or 0.0)
    assert (spec.channels, spec.size) == (theirs.config.latent_channels, 6)
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, std = jax.jit(lambda x: vae.encode(x))(jnp.asarray(channels_last(images)))
        assert_parity(mean, posterior.mean)
        assert_parity(std, posterior.std)
        assert_parity(jax.jit(lambda z: vae.decode(z))(mean), theirs.decode(posterior.mean).sample)
        again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again.encode(images).latent_dist.mean, posterior.mean, rtol=0, atol=0)


def test_names_of_older_releases(tmp_path):
    theirs = autoencoder("sd")
    state, names = theirs.state_dict(), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for name, value in state.items()}
    assert any("query" in name for name in state)
    for name, tensors in (("new", theirs.state_dict()), ("old", state)):
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
        convert(str(tmp_path / f"{name}.safetensors"), str(tmp_path / name))
    assert (tmp_path / "old/model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_single_file_layout(kind, tmp_path):
    """Diffusers reads a single file that we export as the original weights, and so do we."""
    theirs = autoencoder(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "single"), to_layout="single-file-vae")
    state = safetensors.torch.load_file(tmp_path / "single/model.safetensors")
    assert all(name.startswith("first_stage_model.") for name in state)
    read = convert_ldm_vae_checkpoint(state, theirs.config)
    # Diffusers turns the attention's 1x1 convolutions into linear maps, by name.
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(read.pop(name).reshape(tensor.shape), tensor, rtol=0, atol=0)
    assert not read
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "single")  # the number of groups is not in the tensors
    convert(str(tmp_path / "single"), str(tmp_path / "ours"))
    convert(str(tmp_path / "theirs"), str(tmp_path / "direct"))
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()
