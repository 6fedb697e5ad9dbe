"""The training update: a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trm_diffusion.experiment import Experiment
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.recursion.balance import auxiliary_loss, moved_biases
from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.runtime.devices import compiler_options
from trm_diffusion.runtime.optimizer import ema_decay, learning_rate, update_ema
from trm_diffusion.runtime.parameters import Parameters, is_balance_bias
from trm_diffusion.runtime.processes import compiled_together
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, replicated
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.runtime.window import routing_metrics


def loss_and_metrics(
    experiment: Experiment,
    parameters: Parameters,
    images: jax.Array,
    condition: Any,
    key: jax.Array,
    latent_steps: int | jax.Array | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], RoutingReport | None]]:
    """The total loss on one batch, float32 []; the metrics to log, and the gates' reports [R, T, ...].

    images: [B, H, W, C] in [-1, 1], or normalised latents; condition: see conditions/base.py. `key` draws times, noise,
    dropped conditions and the gates' noise. latent_steps: T, see `draw_latent_steps`; None is the model's own.
    metrics["loss"] is the diffusion loss, without the auxiliary terms of the config.
    """
    config, objective = experiment.config, experiment.objective
    time_key, noise_key, drop_key, gate_key, _ = jax.random.split(key, 5)  # the last draws T, once for an update
    batch = images.shape[0]
    times = objective.sample_times(time_key, batch)
    noise = jax.random.normal(noise_key, images.shape, jnp.float32)
    noisy = objective.perturb(images, noise, times)
    dropped = jax.random.bernoulli(drop_key, config.train.label_dropout, (batch,))
    condition = experiment.condition.drop(condition, dropped)
    model = experiment.network(parameters)

    def losses_at(latent_steps):
        output, reports = model(
            noisy, objective.network_times(times), condition, latent_steps=latent_steps, key=gate_key
        )
        return objective.loss(output, images, noise, noisy, times), reports  # [B]

    losses, reports = losses_at(latent_steps)
    quarter = jax.nn.one_hot(jnp.clip(objective.normalized(times) * 4, 0, 3).astype(jnp.int32), 4)  # [B, 4]
    metrics = {
        "loss": jnp.mean(losses),
        "quarter_loss_sum": losses @ quarter,  # [4], by quarter of normalized time, clean first
        "quarter_images": jnp.sum(quarter, axis=0),
        **routing_metrics(reports),
    }
    total = metrics["loss"] + auxiliary_loss(reports, config.model.recursion)
    weight, most = config.train.latent_step_loss_weight, config.model.recursion.latent_steps
    if weight and most > 1:
        fewer = jnp.arange(1, most)
        each = jax.lax.map(lambda steps: jnp.mean(losses_at(steps)[0]), fewer)  # [most - 1]
        counted = fewer < (most if latent_steps is None else latent_steps)
        if config.train.latent_step_loss_power:
            counted = counted * fewer.astype(jnp.float32) ** config.train.latent_step_loss_power
        total += weight * jnp.sum(each * counted) / jnp.maximum(jnp.sum(counted), 1)
    return total, (metrics, reports)


def draw_latent_steps(latent_steps: tuple, key: jax.Array) -> int | jax.Array | None:
    """T of an update: None for the model's own, an int if fixed, else drawn uniformly from low .. high.

    key: of the update's first accumulated part, as `loss_and_metrics` takes it.
    """
    if len(latent_steps) < 2:
        return latent_steps[0] if latent_steps else None
    low, high = latent_steps
    return jax.random.randint(jax.random.split(key, 5)[4], (), low, high + 1)


def make_train_step(experiment: Experiment) -> Callable:
    """Jits a pure function (state, batch) -> (state, metrics) over the mesh, with the state donated.

    A batch is {"image": [B, H, W, C]} and what the condition's `from_batch` reads. An update with a non-finite loss or
    gradient norm changes only the update number and sets metrics["skipped"]. metrics["nonfinite_gradients"], in order
    of path, tells which trainable parameters have a gradient of non-finite norm.

    Each gradient is read once for both the norm and this check. The EMA reads the parameters after the skip is applied,
    so that no program also stores those that a skip discards.
    """
    config, optimizer = experiment.config, experiment.optimizer
    parts = config.train.accumulate
    schedule = learning_rate(config.optim, config.train.updates)

    def split(leaf):
        """[B, ...] -> [parts, B / parts, ...]; interleaved, so that each device keeps its own images."""
        return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = key_for(config.seed, Purpose.TRAINING, state.step)
        latent_steps = draw_latent_steps(config.train.latent_steps, jax.random.fold_in(key, 0))

        def loss(trainable, images, condition, key):
            return loss_and_metrics(experiment, {**trainable, **state.frozen}, images, condition, key, latent_steps)

        def part(_, inputs):
            index, images, condition = inputs
            part_key = jax.random.fold_in(key, index)
            (_, extra), gradients = jax.value_and_grad(loss, has_aux=True)(state.trainable, images, condition, part_key)
            return None, (gradients, extra)

        def accumulate(total, inputs):
            return jax.tree.map(jnp.add, total, part(None, inputs)[1]), None

        images, condition = jax.tree.map(split, (batch["image"], experiment.condition.from_batch(batch)))
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
            decay: update_ema(previous, trainable, ema_decay(float(decay), state.step, config.optim.ema_warmup))
            for decay, previous in state.ema.items()
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
    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(experiment.mesh)),
        out_shardings=(state_shardings, replicated(experiment.mesh)),
        compiler_options=compiler_options(experiment.mesh),
    )
    return compiled_together(jitted)
