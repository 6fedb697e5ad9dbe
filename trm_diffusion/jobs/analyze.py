"""The analysis job: how a trained run routes its tokens, and how long they recurse, while it samples.

The job draws one batch of `sample.batch_size` images, cycling through the classes or texts of the run's grids, and
records the gates' reports at every diffusion step. Reports are means over all tokens that the network sees, including
the unconditional half of guidance; with Heun's sampler they are those of the predictor. With halting, the job also
draws the same batch without it and times both in turn. The report's "liveness" is what training logs
(jobs/liveness.py), of the parameters that are sampled with.
"""

import dataclasses
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.analysis.halting import expert_rows, mean_latent_steps, saving
from trm_diffusion.conditions import SampleRequest
from trm_diffusion.config import Config
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.files import check_writable, write_json
from trm_diffusion.jobs.liveness import make_liveness
from trm_diffusion.jobs.sample import make_sample_fn
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.run.protocol import protocol
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.processes import in_process_0, is_main_process
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.timing import interleaved_seconds

REPEATS = 9  # timed draws with and without halting each; medians are reported
DIGITS = 5  # decimal places of the numbers in the report


def analyze(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    """Writes analysis.json of the run in `workdir`; prints it as one line, without the part by diffusion step."""
    if config.model.recursion.blocks == "none":
        raise UserError("config.model.recursion.blocks is none: no block recurses, so there is nothing to analyze")
    if config.model.recursion.looped:
        raise UserError("config.model.recursion.looped is True: a loop has no gates, so there is no routing to analyze")
    in_process_0(lambda: check_writable(workdir / "analysis.json"))
    experiment, state = load_run(config, workdir)
    parameters = sampling_parameters(experiment, state)
    condition = _condition_of_batch(experiment, experiment.condition.request())
    images, reports = _draw_batch_fn(experiment, parameters, condition, stop, with_reports=True)()
    images, reports = jax.tree.map(np.asarray, (images, reports))
    report = {
        "blocks": list(stack_layout(config.model).recursive),
        "latent_steps": reports.ran.shape[-1],
        **_routing(reports),
        "liveness": _liveness(experiment, workdir, parameters),
        "halting": {"rule": config.model.recursion.halting},
        "protocol": {**protocol(config, update=int(state.step)), "samples": len(images), "label_rule": "grid"},
    }
    if config.model.recursion.halting != "none":
        report["halting"] |= _halting(experiment, parameters, condition, images, reports, stop)
    if not is_main_process():
        return
    print(json.dumps(report), flush=True)
    write_json(workdir / "analysis.json", {**report, "by_diffusion_step": _by_diffusion_step(experiment, reports)})
    say(f"wrote {workdir / 'analysis.json'}")


def _condition_of_batch(experiment: Experiment, request: SampleRequest):
    """The condition of the run's grids, truncated or repeated to `sample.batch_size` images."""
    size = experiment.config.sample.batch_size
    return jax.tree.map(lambda leaf: np.resize(leaf, (size, *leaf.shape[1:])), request.condition)


def _draw_batch_fn(experiment: Experiment, parameters: Parameters, condition, stop, *, with_reports: bool = False):
    """A function that draws the batch. Raises Interrupted when a stop was requested."""
    draw = make_sample_fn(experiment, with_reports=with_reports)
    indices = np.arange(experiment.config.sample.batch_size)

    def once():
        if stop.reached():
            raise Interrupted("stopped before the analysis was complete; nothing was written")
        return draw(parameters, condition, indices)

    return once


def _routing(reports: RoutingReport) -> dict:
    """Routing of each block [R], averaged over diffusion steps and the latent steps that ran."""
    ran = reports.ran / reports.ran.sum((0, 2), keepdims=True)  # [S, R, T]
    return {
        "expert_load": _rounded(np.einsum("srt,srtpm->rpm", ran, reports.load)),
        "gate_entropy_nats": _rounded(np.sum(ran * reports.entropy, axis=(0, 2))),
    }


def _liveness(experiment: Experiment, workdir: epath.Path, parameters: Parameters) -> dict | None:
    """What jobs/liveness.py measures; None, and a line that says why, where the data are missing."""
    try:
        line = make_liveness(experiment, workdir)(parameters)
    except UserError as error:
        say(f"no liveness in the report: {error}")
        return None
    return {name: _rounded(value) for name, value in line.items()}


def _halting(experiment: Experiment, parameters: Parameters, condition, images, reports: RoutingReport, stop) -> dict:
    """What halting saves and changes, compared with the same parameters without it."""
    config = experiment.config
    recursion = dataclasses.replace(config.model.recursion, halting="none")
    model = dataclasses.replace(config.model, recursion=recursion)
    plain = build(dataclasses.replace(config, model=model), condition=experiment.condition)
    without = _draw_batch_fn(plain, {name: parameters[name] for name in plain.model.shapes}, condition, stop)
    seconds = interleaved_seconds(
        {"with": _draw_batch_fn(experiment, parameters, condition, stop), "without": without}, REPEATS
    )
    ratios = [one / other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    rows = expert_rows(reports, experts_per_token=recursion.experts_per_token)
    change = np.sqrt(np.mean(np.square(images - np.asarray(without()))))
    return {
        "mean_latent_steps": _rounded(mean_latent_steps(reports).mean(0)),  # [R]
        "expert_rows_per_token": {name: _rounded(value) for name, value in rows.items()},
        "saved": saving(rows),
        "seconds_a_batch_with": _rounded(statistics.median(seconds["with"])),
        "seconds_a_batch_without": _rounded(statistics.median(seconds["without"])),
        "seconds_ratio": _rounded(statistics.median(ratios)),  # of neighbouring draws
        "timed_draws_of_each": REPEATS,
        "root_mean_square_change_of_images": _rounded(change),
    }


def _by_diffusion_step(experiment: Experiment, reports: RoutingReport) -> list[dict]:
    """For each diffusion step: normalized time (1 noise, 0 clean), mean latent steps [R] and load [R, T, P, M]."""
    objective, steps = experiment.objective, experiment.config.sample.diffusion_steps
    times = objective.normalized(jnp.asarray(objective.time_grid(steps)[:-1], jnp.float32))
    return [
        {"normalized_time": _rounded(time), "mean_latent_steps": _rounded(latent_steps), "expert_load": _rounded(load)}
        for time, latent_steps, load in zip(times, mean_latent_steps(reports), reports.load, strict=True)
    ]


def _rounded(values):
    """Rounds to a number or a nested list for JSON."""
    return np.round(np.asarray(values, np.float64), DIGITS).tolist()
