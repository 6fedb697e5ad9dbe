"""Shared by the parity tests: random PyTorch weights, their conversion through files, and comparison of outputs."""

from pathlib import Path

import jax
import numpy as np
import safetensors.torch
import torch
from flax import nnx

from trm_diffusion.jobs.convert_weights import convert
from trm_diffusion.weights.store import load_weights

TOLERANCE = 1e-4  # largest difference relative to the largest value, float32


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that keep every path active: no zero gates, no unit norms. Non-trainable values stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


def converted(module: torch.nn.Module, directory: Path, layout: str, prefix: str = ""):
    """Converts the module's weights to ours and back to its layout, through files, and asserts that they are equal.

    Returns our weights.
    """
    state = {prefix + name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    directory.mkdir(exist_ok=True)
    if hasattr(module, "save_pretrained") and not prefix:
        module.save_pretrained(directory / "theirs")
        convert(str(directory / "theirs"), str(directory / "ours"))
    else:
        safetensors.torch.save_file(state, directory / "theirs.safetensors")
        convert(str(directory / "theirs.safetensors"), str(directory / "ours"))
    convert(str(directory / "ours"), str(directory / "again"), to_layout=layout)
    (file,) = (directory / "again").glob("*.safetensors")
    again = safetensors.torch.load_file(file)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6 if "pos_embed" in name else 0)
    return load_weights(directory / "ours")


def bound(build, weights) -> nnx.Module:
    """The model that `build()` makes, with the values of `weights`; its blocks must be unrolled."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    named = {path: "/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    values = {path: jax.numpy.asarray(weights.read(_per_layer(name))) for path, name in named.items()}
    assert len(values) == len(weights.specs)
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def _per_layer(name: str) -> str:
    before, found, after = name.partition("/segments/")
    return f"{before}/blocks/{after.replace('/blocks', '', 1)}" if found else name


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_parity(ours, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """ours channels last, theirs channels first."""
    ours, theirs = np.asarray(ours), channels_last(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1e-2  # the output is not just zeros
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
