"""The evaluation job: generated images against real ones, in one JSON file that says how each number was taken."""

import importlib.metadata
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from etils import epath

import trm_diffusion
from trm_diffusion.conditions import make_condition
from trm_diffusion.config import Config
from trm_diffusion.data.scenes.source import SceneSource
from trm_diffusion.files import write_json
from trm_diffusion.jobs.sample import draw_all, make_sample_fn, write_grid
from trm_diffusion.metrics.digits import evaluate_digits
from trm_diffusion.metrics.scenes.score import evaluate_scenes
from trm_diffusion.run.decoder import Decoder, load_decoder
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import is_main_process
from trm_diffusion.runtime.random import Purpose
from trm_diffusion.runtime.signals import StopRequest

SCENES_SHOWN = 6  # rows of `per_class` images in the picture of an evaluation


def evaluate(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    """Measures the run in `workdir` as `evaluate.kind` says.

    Writes evaluation.json and a picture of some of the images, and prints the JSON last.
    """
    if config.evaluate.kind == "none":
        say("config.evaluate.kind is none: nothing to measure")
        return
    experiment, state = load_run(config, workdir)
    parameters, decoder = sampling_parameters(experiment, state), load_decoder(experiment, workdir)
    draw = make_sample_fn(experiment, decoder)

    def generate(condition) -> np.ndarray:
        say(f"drawing {len(condition)} images to evaluate {workdir} at update {int(state.step)}")
        return np.concatenate(list(draw_all(draw, config, parameters, condition, stop)))

    measures = {"digits": _digits, "scenes": _scenes}[config.evaluate.kind](config, workdir, generate)
    if not is_main_process():
        return
    passed = measures.pop("pass")
    report = {**measures, "protocol": protocol(config, int(state.step), decoder), "pass": bool(passed)}
    write_json(workdir / "evaluation.json", report)
    say(f"wrote {workdir / 'evaluation.json'} and pictures in {workdir / 'samples'}")
    print(json.dumps(report), flush=True)


def _digits(config: Config, workdir: epath.Path, generate: Callable) -> dict:
    """Class accuracy by a judge trained on real digits, Frechet distance, memorisation."""
    labels = evaluation_labels(config, config.evaluate.num_samples)
    images = generate(labels)
    measures = evaluate_digits(images, labels)
    by_class = np.argsort(labels, kind="stable").reshape(config.data.num_classes, -1) if _balanced(config) else None
    shown = images if by_class is None else images[by_class[:, : config.sample.per_class].reshape(-1)]
    write_grid(workdir / "samples" / "evaluation.png", shown[: 10 * config.sample.per_class], config)
    passed = (
        measures["class_accuracy"] >= config.evaluate.min_class_accuracy
        and measures["judge_test_accuracy"] >= config.evaluate.min_judge_accuracy
    )
    return {**measures, "pass": passed}


def _scenes(config: Config, workdir: epath.Path, generate: Callable) -> dict:
    """Text following, judged exactly, on compositions that training has seen and on others, `num_samples` of each."""
    condition = make_condition(config, workdir)
    measures = {}
    for split in ("seen", "held_out"):
        source = SceneSource(config.data.image_size, split)
        captions = [source.scene(index)[1] for index in range(config.evaluate.num_samples)]
        images = generate(condition.encode(captions))
        measures[split] = evaluate_scenes(images, source)
        shown = SCENES_SHOWN * config.sample.per_class
        write_grid(workdir / "samples" / f"evaluation_{split}.png", images[:shown], config, captions[:shown])
    passed = measures["seen"]["strict"]["overall"] >= config.evaluate.min_strict_score
    return {**measures, "pass": passed}


def evaluation_labels(config: Config, number: int) -> np.ndarray:
    """Labels [number] int32 of the images to generate, never sorted by class."""
    classes = config.data.num_classes
    if config.evaluate.label_rule == "balanced":
        return np.arange(number, dtype=np.int32) % classes
    rng = np.random.default_rng([config.sample.seed, int(Purpose.SAMPLING)])
    return rng.integers(0, classes, number, dtype=np.int32)


def _balanced(config: Config) -> bool:
    return config.evaluate.label_rule == "balanced" and config.evaluate.num_samples % config.data.num_classes == 0


def protocol(config: Config, update: int, decoder: Decoder | None = None) -> dict:
    """Everything that a figure depends on and that its name does not say."""
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
    """The commit of the source tree, None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
