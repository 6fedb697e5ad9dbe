"""The settings that images depend on, stored with sets of images and with metrics; and the labels to generate."""

import dataclasses
import importlib.metadata
import subprocess
from pathlib import Path

import jax
import numpy as np

import trm_diffusion
from trm_diffusion.config import Config, fields_of
from trm_diffusion.metrics.judges import draw_labels
from trm_diffusion.run.decoder import LatentDecoder
from trm_diffusion.runtime.parameters import Parameters, parameters_sha256

# Groups of the config whose fields are recorded, so that a new field is too. The others shape the weights, which the
# record of a set hashes, or the work of a job.
DRAWING = ("sample", "model", "diffusion", "data")
# Exceptions: fields that change no pixel of an image of given index and condition, beyond rounding.
SAME_PIXELS = (
    # what is drawn and how much at a time; a set records its labels, prompts or contexts themselves
    "sample.classes", "sample.per_class", "sample.batch_size",
    # how the same function is computed
    "model.attention", "model.remat", "model.recursion.dispatch", "model.recursion.remat",
    "model.recursion.scan_latent_steps", "diffusion.normal_cdf",
    # where the text encoders are; a set records what they are
    "model.text.pretrained", "model.text.revision", "model.text.pretrained_dtype",
    # where data are and how they are read; `vae` is recorded by its weights
    "data.source", "data.text", "data.path", "data.tfds_name", "data.split", "data.vae", "data.flip",
    "data.synthetic_records", "data.workers",
)  # fmt: skip
NAMES = {"guidance": "guidance_scale", "seed": "sample_seed"}  # of fields of `sample`, in the record


def evaluation_labels(config: Config, number: int) -> np.ndarray:
    """Labels [number] int32 of the images to generate, never sorted by class."""
    return draw_labels(config.evaluate.label_rule, number, config.data.num_classes, config.sample.seed)


def protocol(config: Config, update: int, decoder: LatentDecoder | None = None) -> dict:
    """What the metrics of a run at this update depend on: sampling settings, seeds, software and device.

    "config" holds the fields of the model and its objective by their path, the rest of `drawing_fields` are entries of
    their own.
    """
    sample, fields = config.sample, drawing_fields(config)
    own = {path.removeprefix("sample."): value for path, value in fields.items() if path.startswith("sample.")}
    decay = config.optim.ema_decays[0] if sample.parameters == "ema" else sample.parameters
    return {
        "samples": config.evaluate.num_samples,
        "label_rule": config.evaluate.label_rule,
        **{NAMES.get(name, name): value for name, value in own.items()},
        "latent_steps": sample.latent_steps or config.model.recursion.latent_steps,
        "recursive_blocks": config.model.recursion.blocks,
        "parameters": "raw" if sample.parameters == "raw" else f"ema {decay}",
        "update": update,
        "train_seed": config.seed,
        "dtype": config.model.dtype,
        "vae": decoder and decoder.record(),
        "config": {path: value for path, value in fields.items() if not path.startswith("sample.")},
        "version": trm_diffusion.__version__,
        "git_commit": git_commit(),
        "jax": importlib.metadata.version("jax"),
        "device": jax.devices()[0].device_kind,
    }


def set_record(config: Config, update: int, parameters: Parameters, decoder: LatentDecoder | None = None) -> dict:
    """The record of a set of images: `protocol`, and a hash of the weights that draw them.

    The caller replaces `samples` and `label_rule` by what the set holds. Every process of the run calls this.
    """
    return protocol(config, update, decoder) | {"weights_sha256": parameters_sha256(parameters)}


def drawing_fields(config: Config) -> dict:
    """Every config field that may change a pixel, by its path without "config.", such as "sample.eta"."""
    values = {}
    for path, _ in fields_of():
        path = path.removeprefix("config.")
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        if path.split(".")[0] in DRAWING and path not in SAME_PIXELS and not dataclasses.is_dataclass(value):
            values[path] = list(value) if isinstance(value, tuple) else value
    return values


def git_commit() -> str | None:
    """The git commit of this source tree; None outside a repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
