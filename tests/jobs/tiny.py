"""A config of everything, small enough to compile and run in seconds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from trm_diffusion.config import Config, default_config, resolve
from trm_diffusion.weights.convert import LAYOUTS, Weights
from trm_diffusion.weights.safetensors import TensorSpec
from trm_diffusion.weights.store import save_weights

ROOT = Path(__file__).parents[2]


def tiny_config(**overrides) -> Config:
    """Digits with two blocks, one of which recurses; `overrides` name fields with __ for dots."""
    c = default_config()
    c.name = "tiny"
    c.model.update(depth=2, width=16, heads=2, patch=4, dtype="float32")
    c.model.recursion.update(blocks="1", rank=4, routing_group=2)
    c.train.update(updates=8, batch_size=8)
    c.optim.update(lr=1e-2, ema_decays=(0.9,), weight_decay=0.01, clip_norm=1.0, warmup_steps=2, schedule="cosine")
    c.sample.update(diffusion_steps=2, guidance=2.0, per_class=1, batch_size=8)
    c.log.update(every=2, samples_every=0, liveness_every=0, tensorboard=False)
    c.checkpoint.every = 4
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return resolve(c)


def text_config(**overrides) -> Config:
    """`tiny_config` with an MMDiT that reads the words of captions."""
    fields = dict(
        data__source="scenes", data__channels=3, data__num_classes=0, model__architecture="mmdit",
        model__mmdit__position_max_size=2, model__mmdit__position_base_size=2,
        model__text__length=5, model__text__features=8, model__text__pooled_features=8, model__text__heads=2,
        model__text__depth=1, model__text__vocabulary=9, sample__per_class=2, sample__sampler="ab2",
    )  # fmt: skip
    return tiny_config(**fields | overrides)


def write_tiny_vae(directory: Path, seed: int = 0, **changes) -> str:
    """Writes a random autoencoder (2 x 2 pixels per latent cell) as `--mode=convert` does; returns the path."""
    model = dict(channels=[4, 8], blocks=1, image_channels=3, latent_channels=4, quant_conv=True, groups=2)
    model |= dict(scale=0.5, shift=0.1) | changes
    rng, shapes = np.random.default_rng(seed), LAYOUTS["diffusers-vae"].shapes(model)
    values = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    specs = {name: TensorSpec(value.shape, value.dtype) for name, value in values.items()}
    save_weights(directory, Weights("vae", model, specs, values.__getitem__, {"layout": "diffusers-vae"}))
    return str(directory)


def command(*arguments: str, devices: int = 1, **options) -> subprocess.Popen:
    """Starts `python -m trm_diffusion.main` with these arguments on this many CPU devices."""
    environment = dict(os.environ)
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "trm_diffusion.main", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for the command, which must exit with `code`; returns its stdout and stderr."""
    return all_finished([process], code)[0]


def all_finished(processes: list[subprocess.Popen], code: int = 0) -> list[tuple[str, str]]:
    """Waits for the processes of one run, each of which must exit with `code`; returns their stdout and stderr.

    A failure shows the output of every process, because the first in the list is rarely the first to have failed.
    """
    texts = [process.communicate(timeout=900) for process in processes]
    ends = [
        f"process {index}: exit {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
        for index, (process, (out, err)) in enumerate(zip(processes, texts, strict=True))
    ]
    assert all(process.returncode == code for process in processes), "\n".join(ends)
    return texts
