"""The training job: a pure update, and the loop around it that resumes, logs, samples and saves.

Where a run starts from, in this order:
    1. its own workdir, if that holds a checkpoint: everything, to the bit, the data iterator included;
    2. `init.workdir`, another run (its first average) or a converted directory: parameters, with a fresh optimiser;
    3. scratch.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from trm_diffusion.config import Config
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.diffusion.objective import per_sample
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.jobs.sample import image_drawer, save_grid
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.recursion.balance import auxiliary_loss, moved_biases
from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.run.decoder import check_latents, keep_spec, load_decoder
from trm_diffusion.run.prompts import check_encoding, keep_encoding, keep_words, request_of, training_source
from trm_diffusion.run.restore import started_state
from trm_diffusion.run.workdir import changed_fields, save_config
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.devices import compiler_options
from trm_diffusion.runtime.logging import RunLogger, say
from trm_diffusion.runtime.optimizer import ema_decay, learning_rate, update_ema
from trm_diffusion.runtime.parameters import Parameters, count, device_bytes, is_balance_bias
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, global_batch, own_rows, replicated
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.runtime.window import Window, routing_metrics


def loss_and_metrics(
    experiment: Experiment, parameters: Parameters, images: jax.Array, condition: Any, key: jax.Array
) -> tuple[jax.Array, tuple[dict[str, jax.Array], RoutingReport | None]]:
    """The loss to minimise on one batch, float32 []; what is logged of it, and the gates' reports [R, T, ...].

    images [B, H, W, C] in [-1, 1] or scaled latents; condition: see `Experiment.condition_of`. `key` draws times,
    noise, dropped conditions, the gates' noise and, where the config gives a range, the number of latent steps.
    metrics["loss"] is the diffusion loss, without the terms that the config adds to it.
    """
    config, objective = experiment.config, experiment.objective
    time_key, noise_key, drop_key, gate_key, depth_key = jax.random.split(key, 5)
    batch = images.shape[0]
    times = objective.sample_times(time_key, batch)
    noise = jax.random.normal(noise_key, images.shape, jnp.float32)
    noisy = objective.perturb(images, noise, times)
    dropped = jax.random.bernoulli(drop_key, config.train.label_dropout, (batch,))
    condition = jax.tree.map(
        lambda null, given: jnp.where(per_sample(dropped, given), null[None], given),
        experiment.null_condition,
        condition,
    )
    model = experiment.network(parameters)

    def losses_at(latent_steps):
        output, reports = model(
            noisy, objective.network_times(times), condition, latent_steps=latent_steps, key=gate_key
        )
        return objective.loss(output, images, noise, noisy, times), reports  # [B]

    latent_steps = draw_latent_steps(config.train.latent_steps, depth_key)
    losses, reports = losses_at(latent_steps)
    quarter = jax.nn.one_hot(jnp.clip(objective.normalized(times) * 4, 0, 3).astype(jnp.int32), 4)  # [B, 4]
    metrics = {
        "loss": jnp.mean(losses),
        "quarter_loss_sum": losses @ quarter,  # [4], by normalized time, clean first
        "quarter_images": jnp.sum(quarter, axis=0),
        **routing_metrics(reports),
    }
    total = metrics["loss"] + auxiliary_loss(reports, config.model.recursion)
    weight, most = config.train.latent_step_loss_weight, config.model.recursion.latent_steps
    if weight and most > 1:
        fewer = jnp.arange(1, most)
        each = jax.lax.map(lambda steps: jnp.mean(losses_at(steps)[0]), fewer)  # [most - 1]
        counted = fewer < (most if latent_steps is None else latent_steps)
        total += weight * jnp.sum(each * counted) / jnp.maximum(jnp.sum(counted), 1)
    return total, (metrics, reports)


def draw_latent_steps(latent_steps: tuple, key: jax.Array) -> int | jax.Array | None:
    """T of this update: None for the model's own, an int if fixed, else drawn uniformly from low .. high."""
    if len(latent_steps) < 2:
        return latent_steps[0] if latent_steps else None
    low, high = latent_steps
    return jax.random.randint(key, (), low, high + 1)


def make_train_step(experiment: Experiment) -> Callable:
    """(state, batch) -> (state, metrics), pure, jitted over the mesh, with the state donated.

    A batch is {"image": [B, H, W, C]} and what `Experiment.condition_of` reads. An update whose loss or gradient norm
    is not finite changes nothing but the update number, and says so in metrics["skipped"]. Of each trained parameter,
    by path, metrics["nonfinite_gradients"] says whether the norm of its gradient is not finite.

    Every gradient is read once for both the norm and that check, and the averages take the parameters as they are kept,
    so that no program writes out the others to read them again.
    """
    config, optimizer = experiment.config, experiment.optimizer
    parts = config.train.accumulate
    schedule = learning_rate(config.optim, config.train.updates)

    def split(leaf):
        """[B, ...] -> [parts, B / parts, ...]; interleaved, so that each device keeps its own images."""
        return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = key_for(config.seed, Purpose.TRAINING, state.step)

        def loss(trainable, images, condition, key):
            return loss_and_metrics(experiment, {**trainable, **state.frozen}, images, condition, key)

        def part(_, inputs):
            index, images, condition = inputs
            part_key = jax.random.fold_in(key, index)
            (_, extra), gradients = jax.value_and_grad(loss, has_aux=True)(state.trainable, images, condition, part_key)
            return None, (gradients, extra)

        def accumulate(total, inputs):
            return jax.tree.map(jnp.add, total, part(None, inputs)[1]), None

        images, condition = jax.tree.map(split, (batch["image"], experiment.condition_of(batch)))
        inputs = (jnp.arange(parts), images, condition)
        total = part(None, jax.tree.map(lambda leaf: leaf[0], inputs))[1]
        if parts > 1:
            total, _ = jax.lax.scan(accumulate, total, jax.tree.map(lambda leaf: leaf[1:], inputs))
        gradients, (metrics, reports) = jax.tree.map(lambda leaf: leaf / parts, total)

        squares = jnp.stack([jnp.sum(jnp.square(gradients[name])) for name in sorted(gradients)])
        gradient_norm = jnp.sqrt(jnp.sum(squares))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)

        def kept(new, old):
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = kept(optax.apply_updates(state.trainable, updates), state.trainable)
        ema = {
            decay: update_ema(average, trainable, ema_decay(float(decay), state.step, config.optim.ema_warmup))
            for decay, average in state.ema.items()
        }
        biases = {name: value for name, value in state.frozen.items() if is_balance_bias(name)}
        moved = moved_biases(biases, reports, stack_layout(config.model), config.model.recursion)
        new_state = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen | kept(moved, biases),
            optimizer=kept(optimizer_state, state.optimizer),
            ema=kept(ema, state.ema),
        )
        metrics |= {
            "gradient_norm": gradient_norm,
            "learning_rate": schedule(state.step),
            "skipped": 1.0 - finite,
            "nonfinite_gradients": ~jnp.isfinite(squares),
        }
        return new_state, metrics

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, experiment.abstract_state)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(experiment.mesh)),
        out_shardings=(state_shardings, replicated(experiment.mesh)),
        compiler_options=compiler_options(experiment.mesh),
    )


def train(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    """Trains to `train.updates`, from wherever the run stands. Raises Interrupted after saving, when asked to stop."""
    experiment = build(config)
    source = training_source(config)
    check_latents(config, source, workdir)
    if source.encodings is not None:
        check_encoding(config, source.encodings.encoding, workdir)
        experiment = dataclasses.replace(experiment, null_text=source.encodings.null)
    iterator = make_iterator(
        source,
        config.data,
        seed=config.seed,
        batch_size=config.train.batch_size,
        rows=own_rows(batch_sharding(experiment.mesh), config.train.batch_size),
    )
    with Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        state, loop = starting_state(experiment, workdir, checkpoints, iterator)
        keep_words(config, workdir)
        keep_spec(source, workdir)
        keep_encoding(source, workdir)
        _describe(experiment, state)
        if int(state.step) < config.train.updates:
            _loop(experiment, workdir, stop, checkpoints, iterator, state, loop)
    iterator.close()


def starting_state(experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints, iterator):
    """The state to go on from and the loop's record, by the rule at the top of this file; moves the iterator along."""
    config, latest = experiment.config, checkpoints.latest_step()
    if latest is not None:
        changes = changed_fields(workdir, config)
        state, loop = checkpoints.restore(latest, experiment.abstract_state, iterator)
        say(f"resuming {workdir} at update {latest}" + (f" with {'; '.join(changes)}" if changes else ""))
    elif config.init.workdir:
        state, loop = started_state(experiment), {}
        laid = f" with {config.init.adapter}" if config.init.adapter else ""
        say(f"starting {workdir} from the parameters of {config.init.workdir}{laid}")
    else:
        state, loop = experiment.fresh_state(), {}
        say(f"starting {workdir} from scratch")
    if jax.process_index() == 0:
        save_config(workdir, config)
    return state, loop


def _describe(experiment: Experiment, state: TrainState) -> None:
    total, trained = count(state.parameters), count(state.trainable)
    recursion = count({name: leaf for name, leaf in state.parameters.items() if "/recursion/" in name})
    devices = experiment.mesh.devices
    say(
        f"{total:,} parameters ({recursion:,} of gates and experts), {trained:,} trained, "
        f"on {devices.size} {devices.flat[0].device_kind} device{'s' if devices.size > 1 else ''}"
    )
    parts = {"parameters": state.parameters, "gradients": state.trainable, "optimiser": state.optimizer}
    megabytes = {name: device_bytes(part) / 1e6 for name, part in (parts | {"averages": state.ema}).items()}
    capacity = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of_all = f" of {capacity / 1e6:,.0f} MB" if capacity else ""
    listed = ", ".join(f"{name} {size:,.1f} MB" for name, size in megabytes.items())
    say(f"memory of each device{of_all}, activations apart: {listed}")


def _loop(experiment, workdir, stop, checkpoints, iterator, state, loop) -> None:
    config, start = experiment.config, int(state.step)
    total = config.train.updates
    train_step, sharding = make_train_step(experiment), batch_sharding(experiment.mesh)
    window = Window(loop, config.train.batch_size)
    main_process = jax.process_index() == 0
    logger = (
        RunLogger(workdir, config.log, name=config.name, total_steps=total, resume_step=start) if main_process else None
    )

    def record(step: int, metrics: dict) -> None:
        """Reads the metrics of update `step`, logs a line when one is due, and gives up when nothing is finite."""
        window.add({name: np.asarray(value) for name, value in metrics.items()})
        if window.skipped_in_a_row:
            say(f"update {step}: not finite, skipped; {_first_bad(metrics, state)}")
        if window.skipped_in_a_row >= config.train.nonfinite_limit:
            raise UserError(
                f"{window.skipped_in_a_row} updates in a row up to {step} were not finite, first in "
                f"{_first_bad(metrics, state)}; lower config.optim.lr or set config.optim.clip_norm. "
                f"The last good checkpoint is kept in {checkpoints.directory}"
            )
        if step % config.log.every == 0 or step == total:
            line = window.line()
            if logger:
                logger.metrics(step, line)

    if config.log.samples_every:
        draw = image_drawer(experiment, load_decoder(experiment, workdir))
        request = request_of(experiment, workdir)
    unread = None  # the metrics of the update before, read while the present one runs
    try:
        for step in range(start + 1, total + 1):
            waited = time.perf_counter()
            batch = next(iterator)
            window.data_wait_seconds += time.perf_counter() - waited
            batch = {
                name: global_batch(sharding, value, config.train.batch_size)
                for name, value in batch.items()
                if name != "index"
            }
            state, metrics = train_step(state, batch)
            if unread:
                record(*unread)
            unread = (step, metrics)
            sampling = config.log.samples_every and step % config.log.samples_every == 0
            stopping = stop.reached()
            saving = step % config.checkpoint.every == 0 or step == total or stopping
            if sampling or saving:
                record(*unread)
                unread = None
            if sampling:
                image = save_grid(draw, experiment, state, request, workdir / "samples" / f"update_{step:07d}.png")
                if logger:
                    logger.image(step, "samples", image)
            if saving:
                checkpoints.save(step, state, iterator, window.record())
            if stopping:
                checkpoints.close()
                raise Interrupted(f"stopped at update {step} of {total}, saved in {workdir}")
    finally:
        if logger:
            logger.close()


def _first_bad(metrics: dict, state: TrainState) -> str:
    """Where a non-finite update went wrong: the first parameter whose gradient's norm is not finite, by path."""
    flags = np.asarray(metrics["nonfinite_gradients"])
    names = [name for name, bad in zip(sorted(state.trainable), flags, strict=True) if bad]
    return f"the gradient of {names[0]} ({len(names)} of {len(flags)} gradients)" if names else "the loss"
