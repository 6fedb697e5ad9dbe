"""The sampling job: draws images from a checkpoint; training and evaluation share its functions."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from trm_diffusion.analysis.grids import captioned_grid, check_finite, image_grid, save_png, stacked, to_uint8
from trm_diffusion.conditions import DATA, PROMPTS, SampleRequest
from trm_diffusion.config import Config
from trm_diffusion.diffusion.guidance import guide
from trm_diffusion.diffusion.samplers import draw_initial_noise
from trm_diffusion.diffusion.samplers import sample as run_sampler
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import check_writable, replacing, sha256_of_arrays, write_json
from trm_diffusion.run.decoder import LatentDecoder, load_decoder
from trm_diffusion.run.drawn_set import visible
from trm_diffusion.run.protocol import set_record
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.devices import compiler_options
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.processes import compiled_together, in_process_0, is_main_process
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, distribute, replicated
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState

GRID_PIXELS = 64  # narrower images are enlarged to about this width
CAPTIONED_PIXELS = 160  # the same, for images with captions


def guided_network(
    experiment: Experiment, parameters: Parameters, condition: Any, *, latent_steps: int | None, **options
) -> Callable:
    """The network that samplers call, network(noisy, times) -> (output, reports), with the config's guidance.

    condition: leaves [B, ...]; with guidance the reports are those of 2B images, the unconditional half second.
    options: passed to the model.
    """
    model, sample = experiment.network(parameters), experiment.config.sample
    return guide(
        lambda noisy, times, condition: model(noisy, times, condition, latent_steps=latent_steps, **options),
        experiment.objective,
        condition,
        experiment.condition.null_like(condition),
        scale=sample.guidance,
        interval=sample.guidance_interval,
        channels=sample.guidance_channels,
    )


def make_sample_program(
    experiment: Experiment, *, with_reports: bool = False, gathered: bool = True
) -> jax.stages.Wrapped:
    """Jits program(parameters, condition [B, ...], indices [B]) -> images or latents [B, H, W, C] float32.

    The batch is sharded over the mesh; the result is replicated if `gathered`, else sharded like the batch.

    An image depends only on its condition (conditions/base.py), its index and `sample.seed`, not on its batch or the
    number of devices. With `with_reports` the program also returns the gates' `RoutingReport` of every diffusion step,
    [S, R, T, ...].
    """
    sample, data, objective = experiment.config.sample, experiment.config.data, experiment.objective
    shape = (data.image_size, data.image_size, data.channels)

    def program(parameters: Parameters, condition: Any, indices: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda index: key_for(sample.seed, Purpose.SAMPLING, index))(indices)
        network = guided_network(experiment, parameters, condition, latent_steps=sample.latent_steps)
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
    out = replicated(experiment.mesh) if gathered else batch
    jitted = jax.jit(
        program,
        in_shardings=(None, batch, batch),
        out_shardings=out,
        compiler_options=compiler_options(experiment.mesh),
    )
    return compiled_together(jitted)


def make_sample_fn(
    experiment: Experiment, decoder: LatentDecoder | None = None, *, with_reports: bool = False, gathered: bool = True
) -> Callable:
    """`make_sample_program` for NumPy arrays: every process passes the whole condition and all indices.

    decoder: decodes the sampled latents to images; cannot be combined with reports.
    """
    program = make_sample_program(experiment, with_reports=with_reports, gathered=gathered)
    batch = batch_sharding(experiment.mesh)

    def draw(parameters: Parameters, condition: Any, indices: np.ndarray):
        drawn = program(parameters, *distribute((condition, indices), batch))
        return drawn if decoder is None else decoder(drawn)

    return draw


def draw_all(
    draw: Callable,
    config: Config,
    parameters: Parameters,
    condition: Any,
    stop: StopRequest | None = None,
    first_index: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the images of a condition [N, ...] in order, a batch at a time; their indices start at `first_index`.

    Raises Interrupted when a stop was requested.
    """
    size, count = config.sample.batch_size, len(jax.tree.leaves(condition)[0])
    for first in range(0, count, size):
        if stop is not None and stop.reached():
            raise Interrupted(f"stopped after {first} of {count} images, which will be redrawn")
        rows = np.arange(first, min(first + size, count))
        padded = np.resize(rows, size)  # one shape, one compilation
        part = jax.tree.map(lambda leaf, rows=padded: leaf[rows], condition)
        images = draw(parameters, part, first_index + np.arange(first, first + size))
        yield np.asarray(images)[: len(rows)]


def save_grid(
    draw: Callable, experiment: Experiment, state: TrainState, request: SampleRequest, path: epath.Path
) -> np.ndarray:
    """Draws a request and writes it as one PNG grid; returns the grid, uint8 [H, W, 3].

    Images that are not finite are shown in grey and reported: they need not end a training run.
    """
    parameters = sampling_parameters(experiment, state)
    images = np.concatenate(list(draw_all(draw, experiment.config, parameters, request.condition)))
    try:
        check_finite(images)
    except UserError as error:
        say(f"warning: {path.name}: {error}")
        images = np.where(np.isfinite(images), images, 0.0)
    return write_grid(path, images, experiment.config, request.captions, request.above)


def write_grid(
    path: epath.Path,
    images: np.ndarray,
    config: Config,
    captions: Sequence[str] | None = None,
    above: np.ndarray | None = None,
) -> np.ndarray:
    """Writes images [N, H, W, C] as a PNG grid, `per_class` in a row with captions below; returns the grid.

    above: [N, H', W, C'] shown above the images.
    """
    size, columns = images.shape[2], config.sample.per_class
    images = images if above is None else stacked(above, images)
    if captions:
        grid = captioned_grid(images, captions, columns, scale=max(1, CAPTIONED_PIXELS // size))
    else:
        grid = image_grid(images, columns, scale=max(1, GRID_PIXELS // size))
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid)
    return grid


def sample(
    config: Config, workdir: epath.Path, stop: StopRequest, prompts: Sequence[str] = (), context: str = ""
) -> None:
    """Draws the grid of the config, of the prompts or the context images at a path, or both, from the run in `workdir`.

    Writes a PNG and an npz of the images; for prompts and contexts, also each image as its own PNG, in a folder with a
    record beside it. Raises UserError if an image is not finite.
    """
    in_process_0(lambda: check_writable(workdir / "samples" / "grid.png"))
    experiment, state = load_run(config, workdir, reads=PROMPTS if prompts or context else DATA)
    condition = experiment.condition
    request = condition.request_context(context, prompts) if context else condition.request(prompts)
    parameters = sampling_parameters(experiment, state)
    decoder = load_decoder(experiment, workdir)
    draw = make_sample_fn(experiment, decoder)
    images = np.concatenate(list(draw_all(draw, config, parameters, request.condition, stop)))
    directory = workdir / "samples"
    step = f"{int(state.step):07d}"
    asked = "context" if context else "prompts" if prompts else ""
    path = directory / f"{asked or 'grid'}_{step}.png"
    write_grid(path, images, config, request.captions, request.above)
    arrays = path.with_suffix(".npz")
    if asked:
        record = set_record(config, int(state.step), parameters, decoder) | {
            "samples": len(images),
            "label_rule": None,
            "text": condition.encoding() if prompts else None,
            "requested_sha256": {name: sha256_of_arrays([("", array)]) for name, array in request.arrays.items()},
        }
    if is_main_process():
        with replacing(arrays) as partial, partial.open("wb") as file:
            np.savez(file, images=images, **request.arrays)
        if asked:
            write_images(directory / f"{asked}_{step}", images, request.captions, record)
    say(f"drew {len(images)} images with {config.sample.parameters} parameters: {path} and {arrays}")
    if asked:
        by = "context" if context else "prompt"
        say(f"each image, named after its {by}: {directory / f'{asked}_{step}'}")


def write_images(directory: epath.Path, images: np.ndarray, captions: Sequence[str], record: dict) -> None:
    """Writes each image, not enlarged, as "NUMBER_WORDS-OF-ITS-CAPTION.png", and how they were drawn beside the folder.

    Images that an earlier call left in the folder are removed: it holds one set. The record is removed first and
    written last, so a folder that has one is complete.
    """
    record_path = directory.with_name(f"{directory.name}.sampling.json")
    record_path.unlink(missing_ok=True)
    for name in visible(directory):
        if re.fullmatch(r"\d{4,}_[a-z0-9-]*\.png", name):
            (directory / name).unlink()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:80]
        save_png(directory / f"{number:04d}_{words}.png", to_uint8(image, caption))
    write_json(record_path, record)
