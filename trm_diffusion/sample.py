"""The sampling job: from a checkpoint to images, and what training and evaluation share of it."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.analysis.grids import image_grid, save_png
from trm_diffusion.build import Experiment, build
from trm_diffusion.config import Config
from trm_diffusion.diffusion.guidance import guide
from trm_diffusion.diffusion.samplers import draw_initial_noise
from trm_diffusion.diffusion.samplers import sample as run_sampler
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.models.dit import stack_layout
from trm_diffusion.models.stack import per_layer
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, replicated
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.runtime.workdir import changed_fields, load_config

CLASSES_SHOWN = 10  # rows of a grid when the config names no classes
GRID_PIXELS = 64  # images narrower than this are shown enlarged


def drawer(experiment: Experiment, *, with_reports: bool = False) -> Callable:
    """draw(parameters, labels [B], indices [B]) -> images [B, H, W, C] float32, jitted over the mesh.

    An image depends on its label, its index and `sample.seed` alone, not on its batch or the number of devices.
    With `with_reports` it also returns the gates' `RoutingReport` of every diffusion step, [S, R, T, ...].
    """
    sample, data, objective = experiment.config.sample, experiment.config.data, experiment.objective
    shape = (data.image_size, data.image_size, data.channels)

    def draw(parameters: Parameters, labels: jax.Array, indices: jax.Array) -> jax.Array:
        model = experiment.model.bind(parameters)
        keys = jax.vmap(lambda index: key_for(sample.seed, Purpose.SAMPLING, index))(indices)
        network = guide(
            lambda noisy, times, labels: model(noisy, times, labels, latent_steps=sample.latent_steps),
            objective,
            labels,
            jnp.full_like(labels, experiment.null_label),
            scale=sample.guidance,
            interval=sample.guidance_interval,
            channels=sample.guidance_channels,
        )
        images, reports = run_sampler(
            network,
            objective,
            draw_initial_noise(keys, shape),
            keys,
            sampler=sample.sampler,
            diffusion_steps=sample.diffusion_steps,
            eta=sample.eta,
        )
        return (images, reports) if with_reports else images

    batch = batch_sharding(experiment.mesh)
    return jax.jit(draw, in_shardings=(None, batch, batch), out_shardings=replicated(experiment.mesh))


def draw_all(
    draw: Callable,
    config: Config,
    parameters: Parameters,
    labels: np.ndarray,
    stop: StopRequest | None = None,
) -> Iterator[np.ndarray]:
    """Images of labels [N], batch by batch, in order; image i has index i. Raises Interrupted when asked to stop."""
    size = config.sample.batch_size
    for first in range(0, len(labels), size):
        if stop is not None and stop.requested:
            raise Interrupted(f"stopped after {first} of {len(labels)} images; they are drawn again next time")
        part = labels[first : first + size]
        padded = np.resize(part, size)  # one shape, one compilation
        images = draw(parameters, jnp.asarray(padded), jnp.arange(first, first + size))
        yield np.asarray(images[: len(part)])


def sampling_parameters(experiment: Experiment, state: TrainState) -> Parameters:
    """The parameters that `sample.parameters` names."""
    which = experiment.config.sample.parameters
    if which == "raw":
        return state.parameters
    decay = str(experiment.config.optim.ema_decays[0]) if which == "ema" else which
    return {**state.ema[decay], **state.frozen}


def grid_labels(config: Config) -> np.ndarray:
    """Labels of a grid, a row of `per_class` for each class, int32."""
    classes = config.sample.classes or range(min(CLASSES_SHOWN, config.data.num_classes))
    return np.repeat(np.asarray(classes, np.int32), config.sample.per_class)


def save_grid(draw: Callable, experiment: Experiment, state: TrainState, path: epath.Path) -> np.ndarray:
    """Draws the grid of the config and writes it as a PNG; returns it, uint8 [H, W, 3]."""
    config = experiment.config
    parameters = sampling_parameters(experiment, state)
    images = np.concatenate(list(draw_all(draw, config, parameters, grid_labels(config))))
    return write_grid(path, images, config)


def write_grid(path: epath.Path, images: np.ndarray, config: Config) -> np.ndarray:
    scale = max(1, GRID_PIXELS // config.data.image_size)
    grid = image_grid(images, columns=config.sample.per_class, scale=scale)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid)
    return grid


def load_run(config: Config, workdir: epath.Path) -> tuple[Experiment, TrainState]:
    """The latest checkpoint of the run in `workdir`, for a config that may differ in how it samples and evaluates."""
    changed_fields(workdir, config)  # refuses another model
    experiment = build(config)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        latest = checkpoints.latest_step()
        if latest is None:
            raise UserError(f"{workdir} holds no checkpoint yet; train first")
        state, _ = checkpoints.restore(latest, experiment.abstract_state)
    return experiment, state


def layers_of_run(workdir: epath.Path) -> Parameters:
    """The parameters (first average) of a run, each block on its own, as `models.stack.per_layer` names them."""
    experiment, state = load_run(load_config(workdir), workdir)
    return per_layer(sampling_parameters(experiment, state), stack_layout(experiment.config.model))


def sample(config: Config, workdir: epath.Path, stop: StopRequest) -> None:
    """Draws the grid of the config from the run in `workdir`; writes a PNG and the images as an npz beside it."""
    experiment, state = load_run(config, workdir)
    labels = grid_labels(config)
    parameters = sampling_parameters(experiment, state)
    images = np.concatenate(list(draw_all(drawer(experiment), config, parameters, labels, stop)))
    path = workdir / "samples" / f"grid_{int(state.step):07d}.png"
    write_grid(path, images, config)
    arrays = path.with_suffix(".npz")
    if jax.process_index() == 0:
        with arrays.open("wb") as file:
            np.savez(file, images=images, labels=labels)
    classes = ", ".join(map(str, dict.fromkeys(labels.tolist())))
    say(
        f"drew {len(labels)} images of classes {classes} with {config.sample.parameters} parameters: {path} and {arrays}"
    )
