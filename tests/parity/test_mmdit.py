"""Our MMDiT equals diffusers' with weights from the same file, in both published layouts, and exports it again."""

import dataclasses
import shutil

import diffusers
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from flax import nnx

from tests.parity.common import assert_parity, bound, channels_last, converted, randomize
from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.models.mmdit import MMDiT
from trm_diffusion.models.text import Text
from trm_diffusion.weights.mmdit import config_of

KINDS = {
    "sd3": {},
    "qk_norm": dict(qk_norm="rms_norm"),
    "dual": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}


def transformer(kind):
    return randomize(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=4,
            joint_attention_dim=20,
            caption_projection_dim=48,
            pooled_projection_dim=10,
            pos_embed_max_size=12,
            **KINDS[kind],
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_layout(kind, tmp_path):
    theirs = transformer(kind)
    weights = converted(theirs, tmp_path, "diffusers-sd3")
    model = weights.model
    assert (model["heads"], model["qk_norm"], model["dual_attention_blocks"]) == (
        4,
        kind != "sd3",
        2 * (kind == "dual"),
    )
    config = dataclasses.replace(config_of(model), dtype="float32")
    sizes = dict(image_size=8, in_channels=4, out_channels=4, text_features=20, pooled_features=10)
    module = bound(lambda: MMDiT(config, **sizes, rngs=nnx.Rngs(0)), weights)

    generator = torch.Generator().manual_seed(1)
    images, states, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (7, 20), (10,)))
    times = torch.tensor([3.0, 977.0])
    text = Text(jnp.asarray(states.numpy()), jnp.ones((2, 7), bool), jnp.asarray(pooled.numpy()))
    output, _ = module(channels_last(images), jnp.asarray(times.numpy()), text)
    again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "again").eval()
    arguments = dict(encoder_hidden_states=states, pooled_projections=pooled, timestep=times)
    with torch.no_grad():
        expected = theirs(images, **arguments).sample
        assert_parity(output, expected)
        torch.testing.assert_close(again(images, **arguments).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_single_file_layout(kind, tmp_path):
    """Diffusers reads a single file that we export as the original weights, and so do we."""
    theirs = transformer(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    convert(str(tmp_path / "theirs"), str(tmp_path / "single"), to_layout="single-file-sd3")
    state = safetensors.torch.load_file(tmp_path / "single/model.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in state)
    read = convert_sd3_transformer_checkpoint_to_diffusers(state)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(read.pop(name), tensor, rtol=0, atol=1e-6 if name == "pos_embed.pos_embed" else 0)
    assert not read
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "single")  # the size that positions are made for
    convert(str(tmp_path / "single"), str(tmp_path / "back"))
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()
