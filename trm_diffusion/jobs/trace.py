"""The trace job: what a run's network would draw after each latent step, at several moments of sampling.

A few images are sampled. At some of their diffusion steps the clean image is estimated again, in three ways:

    T = k        by the whole network with k latent steps, for k from 1 to the config's
    state k      by the final layer, from the state that latent step k + 1 starts from, in the last recursive block
    attention k  where one token attends in latent step k of that block: the goal of a maze, otherwise the middle

The final layer was not trained to read states, so "state k" shows only what a state already holds of the output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.analysis.grids import captioned_grid, save_png, stacked
from trm_diffusion.config import Config
from trm_diffusion.data.sources import source_class
from trm_diffusion.diffusion.samplers import draw_initial_noise
from trm_diffusion.diffusion.samplers import sample as run_sampler
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import check_writable, replacing
from trm_diffusion.jobs.sample import guided_network
from trm_diffusion.run.decoder import LatentDecoder, load_decoder
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.devices import compiler_options
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.processes import in_process_0, is_main_process
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, distribute, replicated
from trm_diffusion.runtime.signals import StopRequest

IMAGES = 8  # traced at most
MOMENTS = 4  # diffusion steps that are shown, evenly spaced from the first on
PICTURE_PIXELS = 96  # narrower images are enlarged to about this width


class Traced(NamedTuple):
    """B images at S moments of sampling, for T latent steps."""

    images: np.ndarray  # [B, H, W, C], as sampled
    normalized_times: np.ndarray  # [S], 1 noise, 0 clean
    noisy: np.ndarray  # [S, B, H, W, C]
    estimates: np.ndarray  # [S, T, B, H, W, C], by the whole network with 1 .. T latent steps
    states: np.ndarray  # [S, T - 1, B, H, W, C], from the states after the intermediate latent steps
    attention: np.ndarray  # [S, T, B, N, M], mean over heads; the keys of a text come after those of the image


def trace(config: Config, workdir: epath.Path, stop: StopRequest, context: str = "") -> None:
    """Traces at most IMAGES images of the run in `workdir`: a PNG of each, and all arrays as npz, in its `samples`.

    context: path of context images to draw from; by default those of the run's grids.
    """
    if config.model.recursion.blocks == "none":
        raise UserError("config.model.recursion.blocks is none: no block recurses, so no latent step can be traced")
    if config.model.recursion.looped:
        raise UserError("config.model.recursion.looped is True: a loop over blocks has no latent states to trace")
    in_process_0(lambda: check_writable(workdir / "samples" / "trace.npz"))
    experiment, state = load_run(config, workdir)
    condition = experiment.condition
    request = condition.request_context(context) if context else condition.request()
    rows = np.arange(0, len(jax.tree.leaves(request.condition)[0]), config.sample.per_class)[:IMAGES]
    decoder = load_decoder(experiment, workdir)
    traced = trace_images(experiment, sampling_parameters(experiment, state), request.condition, rows)
    if not is_main_process():
        return
    path = workdir / "samples" / f"trace_{int(state.step):07d}"
    pictures = traced if decoder is None else _decoded(traced, decoder)
    find_focus = source_class(config.data.source).focus
    for number, row in enumerate(rows):
        given = None if request.above is None else request.above[row]
        focus = (0.5, 0.5) if given is None else tuple((np.asarray(find_focus(given)) + 0.5) / given.shape[:2])
        save_png(path / f"{number:04d}.png", draw(pictures, number, given, focus))
    with replacing(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
        np.savez(file, **traced._asdict(), **{name: values[rows] for name, values in request.arrays.items()})
    say(f"traced {len(rows)} images with {config.sample.parameters} parameters: {path} and {path.with_suffix('.npz')}")


def trace_images(experiment: Experiment, parameters: Parameters, condition: Any, rows: np.ndarray) -> Traced:
    """Traces these rows of a condition [N, ...], at most `sample.batch_size`; row i is sampled with index i."""
    batch = np.resize(rows, experiment.config.sample.batch_size)  # a size that divides over the devices
    inputs = jax.tree.map(lambda leaf: leaf[batch], condition), batch
    traced = _make_program(experiment)(parameters, *distribute(inputs, batch_sharding(experiment.mesh)))
    count = len(rows)
    images, times, noisy, *others = map(np.asarray, traced)
    return Traced(images[:count], times, noisy[:, :count], *(leaf[:, :, :count] for leaf in others))


def _make_program(experiment: Experiment) -> Callable:
    """Jits program(parameters, condition [B, ...], indices [B]) -> `Traced`, with every latent step of the config."""
    config, objective = experiment.config, experiment.objective
    sample, data = config.sample, config.data
    depth = sample.latent_steps or config.model.recursion.latent_steps
    moments = np.unique(np.linspace(0, sample.diffusion_steps, MOMENTS, endpoint=False).astype(int))

    def program(parameters: Parameters, condition: Any, indices: jax.Array) -> Traced:
        def network(latent_steps: int, **options):
            return guided_network(experiment, parameters, condition, latent_steps=latent_steps, **options)

        def observed(noisy, times):
            output, _ = network(depth)(noisy, times)
            return output, (noisy, times)

        keys = jax.vmap(lambda index: key_for(sample.seed, Purpose.SAMPLING, index))(indices)
        noise = draw_initial_noise(keys, (data.image_size, data.image_size, data.channels))
        settings = dict(sampler=sample.sampler, diffusion_steps=sample.diffusion_steps, eta=sample.eta)
        images, seen = run_sampler(observed, objective, noise, keys, **settings)

        def at_moment(point):
            noisy, times = point

            def clean(output):
                return objective.predict(output, noisy, times).clean

            estimates = jnp.stack([clean(network(k)(noisy, times)[0]) for k in range(1, depth + 1)])
            _, reports = network(depth, observe=True)(noisy, times)
            last = jax.tree.map(lambda leaf: leaf[-1, :, : len(noisy)], reports.observed.trace)  # the conditional half
            return estimates, jax.vmap(clean)(last.decoded[1:]), last.attention

        noisy, times = jax.tree.map(lambda leaf: leaf[moments], seen)
        return Traced(images, objective.normalized(times[:, 0]), noisy, *jax.lax.map(at_moment, (noisy, times)))

    batch = batch_sharding(experiment.mesh)
    return jax.jit(
        program,
        in_shardings=(None, batch, batch),
        out_shardings=replicated(experiment.mesh),
        compiler_options=compiler_options(experiment.mesh),
    )


def _decoded(traced: Traced, decoder: LatentDecoder) -> Traced:
    """The same with all latents decoded to images."""

    def decode(latents):
        images = decoder(latents.reshape(-1, *latents.shape[-3:]))
        return images.reshape(*latents.shape[:-3], *images.shape[1:])

    kinds = "images", "noisy", "estimates", "states"
    return traced._replace(**{name: decode(getattr(traced, name)) for name in kinds if getattr(traced, name).size})


def draw(traced: Traced, number: int, context: np.ndarray | None, focus: tuple[float, float]) -> np.ndarray:
    """The picture of one traced image, uint8 [H', W', 3]: moments downwards, latent steps from left to right.

    context: [H, W, C'], what the image was drawn from; focus: (row, column) of the attending token, as a share of the
    image's sides.
    """
    drawn = traced.images[number]
    size, depth = len(drawn), traced.estimates.shape[1]
    blank = np.full_like(drawn, -1)
    rows = [[("drawn", drawn)] if context is None else [("given", context), ("drawn", drawn)]]
    for moment, time in enumerate(traced.normalized_times):
        whole, states, attention = traced.estimates[moment, :, number], traced.states[moment, :, number], []
        for weights in traced.attention[moment, :, number]:  # [N, M]
            grid = int(len(weights) ** 0.5)
            row, column = (min(int(share * grid), grid - 1) for share in focus)
            attended = weights[row * grid + column, : grid**2].reshape(grid, grid, 1)
            attention.append(2 * np.kron(attended / attended.max(), np.ones((size // grid, size // grid, 1))) - 1)
        noisy = (f"noise {time:.2f}", traced.noisy[moment, number])
        rows.append([noisy, *((f"T = {k}", image) for k, image in enumerate(whole, 1))])
        rows.append([("", blank), *((f"state {k}", image) for k, image in enumerate(states, 1))])
        rows.append([("", blank), *((f"attention {k}", image) for k, image in enumerate(attention, 1))])
    cells = [cell for row in rows for cell in [*row, *[("", blank)] * (depth + 1 - len(row))]]
    pictures = np.concatenate([stacked(image[None]) for _, image in cells])
    return captioned_grid(pictures, [caption for caption, _ in cells], depth + 1, scale=max(1, PICTURE_PIXELS // size))
