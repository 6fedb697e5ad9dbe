"""The commands of docs/imagenet.md in miniature: as they stand there, with flags at the end that make them small, on
random weights under the names that they ask for."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.commands import ROOT
from tests.weights.published import random_tensors, write
from trm_diffusion.metrics.adm import POOL_WIDTH, SPATIAL_WIDTH
from trm_diffusion.models.inception import random_state
from trm_diffusion.weights.convert import LAYOUTS

PAGE = ROOT / "docs/imagenet.md"
COMMANDS = re.findall(r"^ {4}(\S.*)$", PAGE.read_text(), re.MULTILINE)

CELLS, IMAGES, UPDATES = 4, 8, 2
AUTOENCODER = dict(  # two pixels a side of a latent cell
    channels=[4, 8], blocks=1, image_channels=3, latent_channels=4, quant_conv=True, groups=2, scale=0.18215, shift=0.0
)  # fmt: skip
DIT = dict(
    depth=2, width=16, heads=2, patch=2, mlp_ratio=4.0, image_size=CELLS, in_channels=4, out_channels=8,
    num_classes=1000
)  # fmt: skip

LATENTS = f"--config.data.image_size={CELLS}"
SMALL = f"{LATENTS} --config.model.depth=2 --config.model.width=16 --config.model.heads=2"
SMALL += f" --config.sample.diffusion_steps=2 --config.sample.batch_size={IMAGES}"
TRAINING = f"{SMALL} --config.train.updates={UPDATES} --config.train.batch_size={IMAGES} --config.log.every=1"
TRAINING += " --config.optim.lr=0.1"  # enough for the samples to change
SAMPLING = f"{SMALL} --num={IMAGES}"
SAMPLING += " --config.sample.parameters=raw"  # the average does not move in so few updates
STEPS = [  # each command's job, and the flags that make it small
    ("convert", ""),
    ("convert", ""),
    ("convert", ""),
    ("prepare", f"{LATENTS} --images_per_shard=5"),
    ("verify", LATENTS),
    ("train", TRAINING),
    ("sample", SAMPLING),
    ("sample", SAMPLING),
    ("evaluate", ""),
    ("evaluate", ""),
    ("compare", ""),
    ("imagenet", "--flops_only"),
]


def miniature() -> list[str]:
    """The page's commands in their order, made small. Fails where the page has others than STEPS."""
    assert [job(command) for command in COMMANDS] == [name for name, _ in STEPS]
    return [f"{command} {flags}" for command, (_, flags) in zip(COMMANDS, STEPS, strict=True)]


def job(command: str) -> str:
    """The mode of `python -m trm_diffusion.main`, and the name of any other module."""
    module, mode = re.match(r"python -m (\S+)(?:.*--mode=(\w+))?", command).groups()
    return (mode or "train") if module == "trm_diffusion.main" else module.rpartition(".")[2]


def without_torch(command: str) -> str:
    """The same with .safetensors for PyTorch's own files, which need PyTorch to be read."""
    return re.sub(r"(--from=\S+)\.pth?\b", r"\1.safetensors", command)


def write_inputs(place: Path, write_torch: Callable[[Path, dict], None] | None = None) -> None:
    """Everything that the page's commands start from but the pictures, which are of TFDS's mock.

    write_torch: writes tensors by name as PyTorch's own files, beside those that `without_torch` names.
    """
    (place / "configs").symlink_to(ROOT / "configs")
    autoencoder = place / "stabilityai/sd-vae-ft-ema"  # where a folder of the hub's id is, the hub is not asked
    autoencoder.mkdir(parents=True)
    (autoencoder / "config.json").write_text(json.dumps(LAYOUTS["diffusers-vae"].config(AUTOENCODER)))
    tensors = random_tensors("diffusers-vae", AUTOENCODER, scale=0.3)
    write(autoencoder / "diffusion_pytorch_model.safetensors", tensors)
    names = re.findall(r"--from=(\S+\.pth?) ", "\n".join(COMMANDS))
    for name, tensors in zip(names, (random_tensors("dit", DIT, scale=0.1), random_state(0)), strict=True):
        write((place / name).with_suffix(".safetensors"), tensors)
        if write_torch:
            write_torch(place / name, tensors)
    statistics = {}
    for mean, covariance, width in (("mu", "sigma", POOL_WIDTH), ("mu_s", "sigma_s", SPATIAL_WIDTH)):
        statistics |= {mean: np.zeros(width), covariance: np.eye(width)}
    pictures = np.random.default_rng(0).integers(0, 256, (IMAGES, 2 * CELLS, 2 * CELLS, 3), np.uint8)
    np.savez(place / "VIRTUAL_imagenet256_labeled.npz", arr_0=pictures, **statistics)
