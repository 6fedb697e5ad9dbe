"""The sampling job: from a checkpoint to images, and what training and evaluation share of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.analysis.grids import captioned_grid, image_grid, save_png
from trm_diffusion.build import Experiment, build
from trm_diffusion.config import Config
from trm_diffusion.diffusion.guidance import guide
from trm_diffusion.diffusion.samplers import draw_initial_noise
from trm_diffusion.diffusion.samplers import sample as run_sampler
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.stack import per_layer
from trm_diffusion.prompts import Request, request_of
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, replicated
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.runtime.workdir import changed_fields, load_config

GRID_PIXELS = 64  # images narrower than this are shown enlarged
CAPTIONED_PIXELS = 160  # and with captions than this


def drawer(experiment: Experiment, *, with_reports: bool = False) -> Callable:
    """draw(parameters, condition [B, ...], indices [B]) -> images [B, H, W, C] float32, jitted over the mesh.

    An image depends on its condition (see `Experiment.condition_of`), its index and `sample.seed` alone, not on its
    batch or the number of devices. With `with_reports` it also returns the gates' `RoutingReport` of every diffusion
    step, [S, R, T, ...].
    """
    sample, data, objective = experiment.config.sample, experiment.config.data, experiment.objective
    shape = (data.image_size, data.image_size, data.channels)

    def draw(parameters: Parameters, condition: Any, indices: jax.Array) -> jax.Array:
        model = experiment.model.bind(parameters)
        keys = jax.vmap(lambda index: key_for(sample.seed, Purpose.SAMPLING, index))(indices)
        network = guide(
            lambda noisy, times, condition: model(noisy, times, condition, latent_steps=sample.latent_steps),
            objective,
            condition,
            jax.tree.map(lambda null, given: jnp.broadcast_to(null, given.shape), experiment.null_condition, condition),
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
    condition: Any,
    stop: StopRequest | None = None,
) -> Iterator[np.ndarray]:
    """Images of a condition [N, ...], batch by batch, in order; image i has index i. Raises Interrupted if asked to."""
    size, count = config.sample.batch_size, len(jax.tree.leaves(condition)[0])
    for first in range(0, count, size):
        if stop is not None and stop.requested:
            raise Interrupted(f"stopped after {first} of {count} images; they are drawn again next time")
        rows = np.arange(first, min(first + size, count))
        padded = np.resize(rows, size)  # one shape, one compilation
        part = jax.tree.map(lambda leaf, rows=padded: jnp.asarray(leaf[rows]), condition)
        images = draw(parameters, part, jnp.arange(first, first + size))
        yield np.asarray(images[: len(rows)])


def sampling_parameters(experiment: Experiment, state: TrainState) -> Parameters:
    """The parameters that `sample.parameters` names."""
    which = experiment.config.sample.parameters
    if which == "raw":
        return state.parameters
    decay = str(experiment.config.optim.ema_decays[0]) if which == "ema" else which
    return {**state.ema[decay], **state.frozen}


def save_grid(
    draw: Callable, experiment: Experiment, state: TrainState, request: Request, path: epath.Path
) -> np.ndarray:
    """Draws what is asked for and writes it as one PNG; returns it, uint8 [H, W, 3]."""
    parameters = sampling_parameters(experiment, state)
    images = np.concatenate(list(draw_all(draw, experiment.config, parameters, request.condition)))
    return write_grid(path, images, experiment.config, request.captions)


def write_grid(path: epath.Path, images: np.ndarray, config: Config, captions: Sequence[str] | None = None):
    """Lays [N, H, W, C] out, `per_class` images in a row and captions under them, and writes a PNG; returns it."""
    size, columns = config.data.image_size, config.sample.per_class
    if captions:
        grid = captioned_grid(images, captions, columns, scale=max(1, CAPTIONED_PIXELS // size))
    else:
        grid = image_grid(images, columns, scale=max(1, GRID_PIXELS // size))
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


def sample(config: Config, workdir: epath.Path, stop: StopRequest, prompts: Sequence[str] = ()) -> None:
    """Draws the grid of the config, or of the prompts, from the run in `workdir`.

    Writes a PNG and the images as an npz beside it; for prompts, each image as a PNG of its own too.
    """
    experiment, state = load_run(config, workdir)
    request = request_of(experiment, workdir, prompts)
    parameters = sampling_parameters(experiment, state)
    images = np.concatenate(list(draw_all(drawer(experiment), config, parameters, request.condition, stop)))
    directory, step = workdir / "samples", f"{int(state.step):07d}"
    path = directory / f"{'prompts' if prompts else 'grid'}_{step}.png"
    write_grid(path, images, config, request.captions)
    arrays = path.with_suffix(".npz")
    if jax.process_index() == 0:
        with arrays.open("wb") as file:
            np.savez(file, images=images, **request.arrays())
        if prompts:
            write_images(directory / f"prompts_{step}", images, request.captions)
    say(f"drew {len(images)} images with {config.sample.parameters} parameters: {path} and {arrays}")
    if prompts:
        say(f"each image by its prompt: {directory / f'prompts_{step}'}")


def write_images(directory: epath.Path, images: np.ndarray, captions: Sequence[str]) -> None:
    """Each image as "NUMBER_WORDS-OF-ITS-CAPTION.png", pixel by pixel."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:80]
        save_png(directory / f"{number:04d}_{name}.png", image_grid(image[None], columns=1, padding=0))
