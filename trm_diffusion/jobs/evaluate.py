"""The evaluation job: generates images from a run and writes their metrics and evaluation settings as one JSON file."""

import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from trm_diffusion.analysis.grids import check_finite
from trm_diffusion.config import Config
from trm_diffusion.files import check_writable, write_json
from trm_diffusion.jobs.sample import draw_all, make_sample_fn, write_grid
from trm_diffusion.metrics.judges import judge_class
from trm_diffusion.run.decoder import load_decoder
from trm_diffusion.run.protocol import protocol
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import in_process_0, is_main_process
from trm_diffusion.runtime.signals import StopRequest


def evaluate(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    """Evaluates the run in `workdir` as `evaluate.kind` says.

    Prints the metrics as one line of JSON, and writes them to evaluation.json with pictures of some images.
    """
    if config.evaluate.kind == "none":
        say("config.evaluate.kind is none: nothing to evaluate")
        return
    in_process_0(lambda: check_writable(workdir / "evaluation.json"))
    experiment, state = load_run(config, workdir)
    parameters = sampling_parameters(experiment, state)
    decoder = load_decoder(experiment, workdir)
    draw = make_sample_fn(experiment, decoder)
    update = int(state.step)
    sample = config.sample
    judge = judge_class(config.evaluate.kind)(
        config.data, config.evaluate, seed=sample.seed, per_class=sample.per_class
    )

    def generate(requested: Sequence) -> np.ndarray:
        say(f"drawing {len(requested)} images to evaluate {workdir} at update {update}")
        images = np.concatenate(list(draw_all(draw, config, parameters, experiment.condition.encode(requested), stop)))
        check_finite(images)
        return images

    evaluation = judge.evaluate(generate)
    report = {**evaluation.measures, "protocol": protocol(config, update, decoder), "pass": bool(evaluation.passed)}
    if is_main_process():
        print(json.dumps(report), flush=True)
    for name, picture in evaluation.pictures.items():
        write_grid(workdir / "samples" / f"{name}.png", picture.images, config, picture.captions)
    if is_main_process():
        write_json(workdir / "evaluation.json", report)
    say(f"wrote {workdir / 'evaluation.json'} and pictures in {workdir / 'samples'}")
