"""Is the recursion alive? What each latent step does, and what the number of latent steps changes.

Measured on a batch that training does not see, where the data have such records, at fixed times and noise, so that runs
compare. It takes forward passes at T = 1, 2, 4, 8 and the config's T, and two gradients: about the time of ten updates,
every `log.liveness_every` updates.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
    config, objective, recursion = experiment.config, experiment.objective, experiment.config.model.recursion
    most = recursion.latent_steps
    depths = sorted({*DEPTHS, most} if recursion.pool == "shared" else {t for t in (*DEPTHS, most) if t <= most})
    batch = distribute(_held_out(experiment, workdir), batch_sharding(experiment.mesh))
    truncated = dataclasses.replace(recursion, truncated_latent_steps=most)
    last_alone = dataclasses.replace(config, model=dataclasses.replace(config.model, recursion=truncated))
    experiments = (
        experiment,
        dataclasses.replace(experiment, model=make_model(last_alone, objective, experiment.condition)),
    )

    def measure(parameters: Parameters, batch: dict) -> dict:
        image, condition = batch["image"], experiment.condition.from_batch(batch)
        time_key, noise_key = jax.random.split(jax.random.key(0))
        times = objective.sample_times(time_key, len(image))
        noise = jax.random.normal(noise_key, image.shape, jnp.float32)
        noisy = objective.perturb(image, noise, times)

        def forward(parameters, experiment=experiment, **options):
            network = experiment.network(parameters)
            output, reports = network(noisy, objective.network_times(times), condition, **options)
            return output, jnp.mean(objective.loss(output, image, noise, noisy, times)), reports

        outputs, losses, reports = {}, {}, None
        for steps in depths:
            outputs[steps], losses[steps], found = forward(parameters, latent_steps=steps, observe=steps == most)
            reports = found if steps == most else reports
        size = jnp.maximum(jnp.linalg.norm(outputs[1].ravel()), jnp.finfo(jnp.float32).tiny)
        later = depths[1:]
        line = {f"output_change_{t}": jnp.linalg.norm((outputs[t] - outputs[1]).ravel()) / size for t in later}
        line |= {f"loss_change_{t}": losses[t] - losses[1] for t in later}
        if reports is None:
            return line
        alive = reports.observed.liveness
        line |= {"attention_entropy": alive.entropy, "update_ratio": alive.update}
        if most > 1:
            line |= {"state_change": alive.change[:, :-1], "state_drift": alive.drift[:, :-1]}
        if most > 1 and recursion.halting == "none":
            adapters = {name: value for name, value in parameters.items() if "/recursion/pool/experts/" in name}
            whole, last = (
                jax.grad(lambda some, one=one: forward({**parameters, **some}, one)[1])(adapters) for one in experiments
            )
            line["gradient_ratio"] = _norm(jax.tree.map(jnp.subtract, whole, last)) / jnp.maximum(_norm(last), 1e-30)
        return line

    program = jax.jit(measure, out_shardings=replicated(experiment.mesh))

    def liveness(parameters: Parameters) -> dict:
        line = program(parameters, batch)
        return {name: np.asarray(value, np.float64).tolist() for name, value in line.items()}

    return liveness


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


def _norm(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
