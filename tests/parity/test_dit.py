"""Our DiT equals PyTorch's with weights from the same file, in both published layouts, and exports that file again."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity import official_dit
from tests.parity.common import assert_parity, bound, channels_last, converted, randomize
from trm_diffusion.models.dit import DiT, DiTConfig, dit_size
from trm_diffusion.weights.convert import detect
from trm_diffusion.weights.source import open_source

TINY = dict(depth=3, width=48, heads=4, patch=2)
SIZES = dict(image_size=8, in_channels=4, out_channels=8, num_classes=10)


def ours(weights, model, sizes, **options):
    config = DiTConfig(**model, dtype="float32", scan_blocks=False, **options)
    return bound(lambda: DiT(config, **sizes, rngs=nnx.Rngs(0)), weights)


def inputs(sizes, batch=2):
    generator = torch.Generator().manual_seed(1)
    size = sizes["image_size"]
    images = torch.randn(batch, sizes["in_channels"], size, size, generator=generator)
    return images, torch.tensor([3, 977][:batch]), torch.tensor([4, sizes["num_classes"]][:batch])


def assert_same_function(module, theirs, sizes):
    images, times, labels = inputs(sizes)
    output, _ = module(channels_last(images), jnp.asarray(times.numpy(), jnp.float32), jnp.asarray(labels.numpy()))
    with torch.no_grad():
        assert_parity(output, theirs(images, times, labels))


@pytest.mark.parametrize("model", [TINY, TINY | dict(patch=4), dit_size("S/2")], ids=["tiny", "patch4", "S/2"])
def test_official_layout(model, tmp_path):
    sizes = dict(image_size=32, in_channels=4, out_channels=8, num_classes=1000) if model["width"] > 48 else SIZES
    names = ("image_size", "in_channels", "out_channels", "num_classes")
    theirs = randomize(official_dit.DiT(*model.values(), *(sizes[name] for name in names)))
    weights = converted(theirs, tmp_path, "dit")
    assert weights.parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert weights.model["image_size"] == sizes["image_size"] and weights.model["mlp_ratio"] == 4
    assert_same_function(ours(weights, model, sizes), theirs, sizes)


def diffusers_dit():
    return randomize(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=TINY["heads"],
            attention_head_dim=TINY["width"] // TINY["heads"],
            num_layers=TINY["depth"],
            patch_size=TINY["patch"],
            sample_size=SIZES["image_size"],
            in_channels=SIZES["in_channels"],
            out_channels=SIZES["out_channels"],
            num_embeds_ada_norm=SIZES["num_classes"],
        )
    )


def with_equal_embedders(module):
    first = module.transformer_blocks[0].norm1.emb.state_dict()
    for block in module.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return module


def test_diffusers_layout(tmp_path):
    """frequency_shift 1 is the library's model as it is; 0 is the model that the weights were published for."""
    theirs = with_equal_embedders(diffusers_dit())
    weights = converted(theirs, tmp_path, "diffusers-dit")
    assert weights.model["heads"] == TINY["heads"]

    def run(images, times, labels):
        return theirs(images, timestep=times, class_labels=labels).sample

    assert_same_function(ours(weights, TINY, SIZES, frequency_shift=1), run, SIZES)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert_same_function(ours(weights, TINY, SIZES), run, SIZES)
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "again").eval()
    images, times, labels = inputs(SIZES)
    for block in loaded.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, times, labels).sample, run(images, times, labels), rtol=0, atol=0)


def test_torch_file(tmp_path):
    """A .pt file, with plain weights or a training checkpoint, opens as its bfloat16 weights by name."""
    theirs = randomize(official_dit.DiT(*TINY.values(), 8, 4, 8, 10)).to(torch.bfloat16)
    state = theirs.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": {}, "ema": state, "opt": {"lr": 0.1}}, tmp_path / "training.pt")
    for name in ("plain.pt", "training.pt"):
        source = open_source(str(tmp_path / name))
        assert detect(source)[0].name == "dit" and source.tensors.keys() == state.keys()
        for key, tensor in source.tensors.items():
            assert tensor.dtype == jnp.bfloat16
            np.testing.assert_array_equal(tensor.astype(np.float32), state[key].float().numpy())
