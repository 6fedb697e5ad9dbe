"""Is the recursion alive? What each latent step does, and what the number of latent steps changes.

Measured on a batch that training does not see, where the data have such records, at fixed times and noise, so that runs
compare. It takes forward passes at T = 1, 2, 4, 8 and the config's T, and two gradients: for configs/digits.py the time
of 1.4 updates, or 0.14% of a run that measures every 1,000 (`log.liveness_every`). The update itself measures nothing.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from trm_diffusion.conditions import make_condition
from trm_diffusion.data.sources import source_class
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment, make_model
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.sharding import batch_sharding, distribute, replicated

DEPTHS = (1, 2, 4, 8)
LEAST_CHANGE = 0.005  # of the output by T latent steps rather than one, below which a warning says so
PAGE = 'docs/mechanism.md, "Is the recursion alive?"'


def make_liveness(experiment: Experiment, workdir: epath.Path) -> Callable[[Parameters], dict]:
    """A function of the parameters that measures; its numbers and lists have short names, for a line of metrics.

    output_change_T   ||f_T - f_1|| / ||f_1|| of the network's output at T latent steps
    loss_change_T     loss at T minus that at one, on the same batch
    state_change, state_drift, attention_entropy, update_ratio   of each recursive block and latent step,
                      models/recursion/observe.py; the first two without the last latent step
    gradient_ratio    of A and B: norm of the gradient through intermediate latent steps over that through the last
                      (not with halting)
    """
    recursion = experiment.config.model.recursion
    most = recursion.latent_steps
    depths = sorted({*DEPTHS, most} if recursion.pool == "shared" else {t for t in (*DEPTHS, most) if t <= most})
    batch = distribute(_held_out(experiment, workdir), batch_sharding(experiment.mesh))
    at_depth, gradient_ratio = _programs(experiment)

    def liveness(parameters: Parameters) -> dict:
        line, alive = {}, None
        for steps in depths:  # the first is 1
            output, loss_at, found = at_depth(parameters, batch, steps, steps == most)
            alive = found if steps == most else alive
            if steps == 1:
                first, loss = output, loss_at
            else:
                line |= {f"output_change_{steps}": _difference(first, output), f"loss_change_{steps}": loss_at - loss}
        if alive is not None:
            line |= {"attention_entropy": alive.entropy, "update_ratio": alive.update}
        if alive is not None and most > 1:
            line |= {"state_change": alive.change[:, :-1], "state_drift": alive.drift[:, :-1]}
            if recursion.halting == "none":
                line["gradient_ratio"] = gradient_ratio(parameters, batch)
        return {name: np.asarray(value, np.float64).tolist() for name, value in line.items()}

    return liveness


def _programs(experiment: Experiment) -> tuple[Callable, Callable]:
    """Two compiled functions; each needs no more memory than an update.

    at_depth(parameters, batch, T, liveness) -> the network's output, the mean loss, and the `Liveness` [R, T] or None.
    gradient_ratio(parameters, batch): of A and B, see `make_liveness`.
    """
    config, objective, mesh = experiment.config, experiment.objective, experiment.mesh
    recursion = config.model.recursion
    constant = dataclasses.replace(recursion, truncated_latent_steps=recursion.latent_steps)
    constant = dataclasses.replace(config, model=dataclasses.replace(config.model, recursion=constant))
    truncated = dataclasses.replace(experiment, model=make_model(constant, objective, experiment.condition))

    def forward(experiment: Experiment, parameters: Parameters, batch: dict, **options):
        image, condition = batch["image"], experiment.condition.from_batch(batch)
        time_key, noise_key = jax.random.split(jax.random.key(0))
        times = objective.sample_times(time_key, len(image))
        noise = jax.random.normal(noise_key, image.shape, jnp.float32)
        noisy = objective.perturb(image, noise, times)
        network = experiment.network(parameters)
        output, reports = network(noisy, objective.network_times(times), condition, **options)
        alive = None if reports is None or reports.observed is None else reports.observed.liveness
        return output, jnp.mean(objective.loss(output, image, noise, noisy, times)), alive

    def at_depth(parameters: Parameters, batch: dict, latent_steps: int, observe: bool):
        return forward(experiment, parameters, batch, latent_steps=latent_steps, observe=observe)

    def gradient_ratio(parameters: Parameters, batch: dict) -> jax.Array:
        def gradient(experiment: Experiment) -> Parameters:
            adapters = {name: value for name, value in parameters.items() if "/recursion/pool/experts/" in name}
            return jax.grad(lambda some: forward(experiment, {**parameters, **some}, batch)[1])(adapters)

        last = gradient(truncated)
        through = jax.tree.map(jnp.subtract, gradient(experiment), last)
        return optax.tree.norm(through) / jnp.maximum(optax.tree.norm(last), jnp.finfo(jnp.float32).tiny)

    whole = replicated(mesh)
    return (
        jax.jit(at_depth, static_argnums=(2, 3), out_shardings=(batch_sharding(mesh), whole, whole)),
        jax.jit(gradient_ratio, out_shardings=whole),
    )


@jax.jit
def _difference(one: jax.Array, other: jax.Array) -> jax.Array:
    """||other - one|| / ||one||, []; 0 if both are zero."""
    size = jnp.maximum(jnp.linalg.norm(one.ravel()), jnp.finfo(jnp.float32).tiny)
    return jnp.linalg.norm((other - one).ravel()) / size


def warn_if_dead(experiment: Experiment, line: dict, update: int) -> None:
    """Says in one line if T latent steps change the output by less than LEAST_CHANGE, once the warm-up is over."""
    steps = experiment.config.model.recursion.latent_steps
    change = line.get(f"output_change_{steps}", math.inf)
    if update > experiment.config.optim.warmup_steps and change < LEAST_CHANGE:
        say(
            f"update {update}: T = {steps} latent steps change the network's output by {change:.2%} of that at T = 1; "
            f"the recursion does almost nothing. {PAGE}, says why and what to try"
        )


def _held_out(experiment: Experiment, workdir: epath.Path) -> dict[str, np.ndarray]:
    """As many records as an update processes at a time, from all over the data that training does not see.

    They are training data if the source has no other split, or the split lacks what the condition needs.
    """
    config = experiment.config
    data = dataclasses.replace(config.data, split=source_class(config.data.source).held_out_split or config.data.split)
    try:
        source = make_condition(dataclasses.replace(config, data=data), workdir).source()
    except UserError:
        source = experiment.condition.source()
    size = config.train.batch_size // config.train.accumulate
    elements = [source[int(index)] for index in np.linspace(0, len(source) - 1, size)]
    names = ("image", *experiment.condition.record_shapes)
    return {name: np.stack([element[name] for element in elements]) for name in names}
