"""The evaluation settings stored with the metrics, and the labels of the images to generate."""

import importlib.metadata
import subprocess
from pathlib import Path

import jax
import numpy as np

import trm_diffusion
from trm_diffusion.config import Config
from trm_diffusion.metrics.judges import draw_labels
from trm_diffusion.run.decoder import LatentDecoder


def evaluation_labels(config: Config, number: int) -> np.ndarray:
    """Labels [number] int32 of the images to generate, never sorted by class."""
    return draw_labels(config.evaluate.label_rule, number, config.data.num_classes, config.sample.seed)


def protocol(config: Config, update: int, decoder: LatentDecoder | None = None) -> dict:
    """What the metrics of a run at this update depend on: sampling settings, seeds, software and device."""
    sample = config.sample
    decay = config.optim.ema_decays[0] if sample.parameters == "ema" else sample.parameters
    return {
        "samples": config.evaluate.num_samples,
        "label_rule": config.evaluate.label_rule,
        "sampler": sample.sampler,
        "diffusion_steps": sample.diffusion_steps,
        "guidance_scale": sample.guidance,
        "guidance_interval": list(sample.guidance_interval),
        "guidance_channels": sample.guidance_channels,
        "latent_steps": sample.latent_steps or config.model.recursion.latent_steps,
        "recursive_blocks": config.model.recursion.blocks,
        "parameters": "raw" if sample.parameters == "raw" else f"ema {decay}",
        "update": update,
        "train_seed": config.seed,
        "sample_seed": sample.seed,
        "dtype": config.model.dtype,
        "vae": decoder and decoder.record(),
        "version": trm_diffusion.__version__,
        "git_commit": git_commit(),
        "jax": importlib.metadata.version("jax"),
        "device": jax.devices()[0].device_kind,
    }


def git_commit() -> str | None:
    """The git commit of this source tree; None outside a repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
