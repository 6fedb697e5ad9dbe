"""The training job: the loop over updates, which logs, samples, saves checkpoints and stops on request.

run/restore.py decides how a run resumes or starts; jobs/train_step.py has the update.
"""

import time

import jax
import numpy as np
from etils import epath

from trm_diffusion.conditions import make_condition
from trm_diffusion.config import Config
from trm_diffusion.data.pipeline import Batch, make_iterator
from trm_diffusion.errors import Interrupted
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.jobs.liveness import make_liveness, warn_if_dead
from trm_diffusion.jobs.sample import make_sample_fn, save_grid
from trm_diffusion.jobs.skipped import first_bad, tell_skipped, too_many_skipped
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.data_record import check_data, keep_data
from trm_diffusion.run.decoder import check_latents, keep_spec, load_decoder
from trm_diffusion.run.restore import restore_or_init
from trm_diffusion.run.workdir import changed_fields
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.doubt import Doubt
from trm_diffusion.runtime.logging import RunLogger, say
from trm_diffusion.runtime.parameters import count, device_bytes
from trm_diffusion.runtime.processes import is_main_process
from trm_diffusion.runtime.sharding import batch_sharding, global_batch, own_rows
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.runtime.window import Window


def train(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    """Trains the run up to `train.updates`, resuming if it can. On a stop request, saves and raises Interrupted.

    Raises UserError if another job trains in `workdir`.
    """
    with claimed(workdir, "--mode=train", stop):
        _train(config, workdir, stop)


def _train(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    condition = make_condition(config, workdir)
    experiment = build(config, condition=condition)
    source = condition.source()
    check_latents(config, source, workdir)
    condition.check(source)
    iterator = make_iterator(
        source,
        config.data,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rows=own_rows(batch_sharding(experiment.mesh), config.train.batch_size),
    )
    with Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        if checkpoints.latest_step() is not None:
            changed_fields(workdir, config)  # raises if the model differs, which explains more than other data do
            check_data(source, workdir)
        state, loop = restore_or_init(experiment, workdir, checkpoints, iterator)
        keep_spec(source, workdir)
        keep_data(source, workdir)
        condition.keep(source)
        _describe(experiment, state)
        if int(state.step) < config.train.updates:
            _loop(experiment, workdir, stop, checkpoints, iterator, state, loop)
    iterator.close()


def _describe(experiment: Experiment, state: TrainState) -> None:
    total, trained = count(state.parameters), count(state.trainable)
    recursion = count({name: leaf for name, leaf in state.parameters.items() if "/recursion/" in name})
    devices = experiment.mesh.devices
    say(
        f"{total:,} parameters ({recursion:,} of gates and experts), {trained:,} trained, "
        f"on {devices.size} {devices.flat[0].device_kind} device{'s' if devices.size > 1 else ''}"
    )
    parts = {"parameters": state.parameters, "gradients": state.trainable, "optimiser": state.optimizer}
    megabytes = {name: device_bytes(part) / 1e6 for name, part in (parts | {"EMA": state.ema}).items()}
    capacity = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of_capacity = f" ({capacity / 1e6:,.0f} MB)" if capacity else ""
    listed = ", ".join(f"{name} {size:,.1f} MB" for name, size in megabytes.items())
    say(f"memory of each device{of_capacity}, without activations: {listed}")


def _loop(experiment, workdir, stop, checkpoints, iterator, state, loop) -> None:
    config = experiment.config
    start, total = int(state.step), config.train.updates
    train_step = make_train_step(experiment)
    sharding = batch_sharding(experiment.mesh)
    window, doubt = Window(loop, config.train.batch_size), Doubt(loop)
    checkpoints.protect(doubt.since)
    logger = None
    if is_main_process():
        logger = RunLogger(workdir, config.log, name=config.name, total_steps=total, resume_step=start)

    measures = config.log.liveness_every if config.model.recursion.blocks != "none" else 0
    liveness = make_liveness(experiment, workdir) if measures else None

    def line_is_due(step: int) -> bool:
        return step % config.log.every == 0 or step == total

    def liveness_is_due(step: int) -> bool:
        """In the first line at or after each multiple of `log.liveness_every`, and in the last."""
        return bool(measures) and line_is_due(step) and (step % measures < config.log.every or step == total)

    def record(step: int, metrics: dict, rows: Batch) -> None:
        """Reads the metrics of update `step`, logs a line when due, and raises UserError at `train.nonfinite_limit`.

        rows: this process's part of the batch.
        """
        window.add({name: np.asarray(value) for name, value in metrics.items()})
        begins = doubt.add(step, bool(window.skipped_in_a_row))
        checkpoints.protect(doubt.since)
        if window.skipped_in_a_row:
            records = iterator.nonfinite_records(rows)
            bad = first_bad(metrics, state.trainable, records)
            tell_skipped(step, bad, checkpoints if begins else None)
            if window.skipped_in_a_row >= config.train.nonfinite_limit:
                rate = None if records else float(metrics["learning_rate"])
                raise too_many_skipped(step, window.skipped_in_a_row, bad, checkpoints, doubt.since, rate)
        if line_is_due(step):
            line = window.line()
            if liveness_is_due(step):
                line |= liveness(state.parameters)
            if logger:
                logger.metrics(step, line)
                warn_if_dead(experiment, line, step)

    if config.log.samples_every:
        draw = make_sample_fn(experiment, load_decoder(experiment, workdir))
        request = experiment.condition.request()
    unread = None  # the previous update, its metrics and batch, read while the current update runs
    try:
        for step in range(start + 1, total + 1):
            wait_start = time.perf_counter()
            rows = next(iterator)
            window.data_wait_seconds += time.perf_counter() - wait_start
            batch = {
                name: global_batch(sharding, value, config.train.batch_size)
                for name, value in rows.items()
                if name != "index"
            }
            state, metrics = train_step(state, batch)
            if unread:
                record(*unread)
            unread = (step, metrics, rows)
            sampling = config.log.samples_every and step % config.log.samples_every == 0
            stopping = stop.reached()
            saving = step % config.checkpoint.every == 0 or step == total or stopping
            if sampling or saving or liveness_is_due(step):
                record(*unread)
                unread = None
            if sampling:
                image = save_grid(draw, experiment, state, request, workdir / "samples" / f"update_{step:07d}.png")
                if logger:
                    logger.image(step, "samples", image)
            if saving:
                checkpoints.save(step, state, iterator, window.record() | doubt.record())
            if stopping:
                checkpoints.close()
                raise Interrupted(f"stopped at update {step} of {total}, saved in {workdir}")
    finally:
        if logger:
            logger.close()
