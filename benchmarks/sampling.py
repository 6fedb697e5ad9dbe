"""What does sampling cost on top of the network? Measured as the time of a diffusion step over one forward pass.

    python -m benchmarks.sampling [--save docs/results/benchmark_sampling.json]

It times the sampling job's own program, DiT-S/2 in float32 with 8 images, on the devices that JAX finds. Noise and all
diffusion steps are included, files are not. The reference of each row is one forward pass with the same batch as the
network sees: twice as many images with guidance. Programs run in turns, and ratios are medians over the turns. Target:
the sampler adds at most 10% to the network.
"""

import argparse
import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp

from benchmarks.measure import interleaved_seconds, median_ratio, progress, report, rounded
from benchmarks.recursion import experiment
from trm_diffusion.experiment import build
from trm_diffusion.jobs.sample import make_sample_fn

MOST_OVER_FORWARD = 1.10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Problem sizes; the tests use smaller ones."""

    depth: int = 12
    images: int = 8
    diffusion_steps: int = 10
    repeats: int = 5


ROWS = {  # name: objective, sampler, guidance
    "ddpm": ("ddpm", "ddpm", 1.0),
    "ddim": ("ddpm", "ddim", 1.0),
    "euler": ("rectified_flow", "euler", 1.0),
    "ab2": ("rectified_flow", "ab2", 1.0),
    "heun": ("rectified_flow", "heun", 1.0),
    "ddpm_guided": ("ddpm", "ddpm", 1.5),
    "euler_guided": ("rectified_flow", "euler", 1.5),
}


def measure(sizes: Sizes, rows: dict = ROWS) -> dict:
    base = experiment("S/2", "none", 1, sizes.images, dtype="float32", depth=sizes.depth).config
    programs, labels = {}, jnp.arange(sizes.images)
    for name, (objective, sampler, guidance) in rows.items():
        diffusion = dataclasses.replace(base.diffusion, objective=objective, learned_sigma=objective == "ddpm")
        sample = dataclasses.replace(
            base.sample, sampler=sampler, guidance=guidance, diffusion_steps=sizes.diffusion_steps
        )
        built = build(dataclasses.replace(base, diffusion=diffusion, sample=sample))
        state = built.init_state()
        programs[name] = functools.partial(make_sample_fn(built), state.parameters, labels, jnp.arange(sizes.images))
        forward_name = f"forward_{objective}_{_network_images(sizes, guidance)}"
        if forward_name not in programs:
            programs[forward_name] = _forward(built, state.parameters, _network_images(sizes, guidance))
    seconds = interleaved_seconds(programs, sizes.repeats)
    found = {}
    for name, (objective, sampler, guidance) in rows.items():
        images = _network_images(sizes, guidance)
        evaluations = 2 * sizes.diffusion_steps - 1 if sampler == "heun" else sizes.diffusion_steps
        ratio = median_ratio(seconds[name], seconds[f"forward_{objective}_{images}"]) / evaluations
        median = statistics.median(seconds[name])
        found[name] = {
            "images_per_second": sizes.images / median,
            "network_evaluations": evaluations,
            "milliseconds_per_evaluation": 1e3 * median / evaluations,
            "evaluation_over_forward_pass": ratio,
            "pass": ratio <= MOST_OVER_FORWARD,
        }
        progress(f"{name}: {found[name]}")
    return {
        "device": jax.devices()[0].device_kind,
        "setting": f"DiT-S/2, {sizes.depth} blocks, float32, {sizes.images} images, "
        f"{sizes.diffusion_steps} diffusion steps, medians of {sizes.repeats} turns",
        "rows": found,
        "pass": all(row["pass"] for row in found.values()),
    }


def _network_images(sizes: Sizes, guidance: float) -> int:
    return sizes.images * (1 if guidance == 1.0 else 2)


def _forward(built, parameters, images: int):
    data = built.config.data
    noisy = jax.random.normal(jax.random.key(0), (images, data.image_size, data.image_size, data.channels))
    times, labels = jnp.full(images, 500.0), jnp.arange(images)
    forward = jax.jit(lambda parameters, *inputs: built.model.bind(parameters)(*inputs)[0])
    return functools.partial(forward, parameters, noisy, times, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    report("sampling", rounded(measure(Sizes())), arguments.save)


if __name__ == "__main__":
    main()
