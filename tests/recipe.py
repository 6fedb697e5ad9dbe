"""The commands of docs/imagenet.md in miniature: unchanged except for flags at the end that make them small, on random
weights with the file names that they expect."""

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
AUTOENCODER = dict(  # 2 x 2 pixels per latent cell
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
TRAINING += " --config.optim.lr=0.1"  # large enough to change the samples
SAMPLING = f"{SMALL} --num={IMAGES}"
SAMPLING += " --config.sample.parameters=raw"  # the EMA hardly moves in so few updates
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
    """The page's commands in order, made small. Fails if their jobs differ from STEPS."""
    assert [job(command) for command in COMMANDS] == [name for name, _ in STEPS]
    return [f"{command} {flags}" for command, (_, flags) in zip(COMMANDS, STEPS, strict=True)]


def job(command: str) -> str:
    """The mode of `python -m trm_diffusion.main`, and the name of any other module."""
    module, mode = re.match(r"python -m (\S+)(?:.*--mode=(\w+))?", command).groups()
    return (mode or "train") if module == "trm_diffusion.main" else module.rpartition(".")[2]


def without_torch(command: str) -> str:
    """The command with .safetensors in place of PyTorch files, which only PyTorch can read."""
    return re.sub(r"(--from=\S+)\.pth?\b", r"\1.safetensors", command)


def write_inputs(place: Path, write_torch: Callable[[Path, dict], None] | None = None) -> None:
    """Writes all inputs of the page's commands, except the pictures, which TFDS mocks.

    write_torch: writes tensors by name as a PyTorch file, beside the files that `without_torch` names.
    """
    (place / "configs").symlink_to(ROOT / "configs")
    # A local folder with the name of a hub id is used in place of the hub.
    autoencoder = place / "stabilityai/sd-vae-ft-ema"
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
