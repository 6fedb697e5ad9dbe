"""How fast is a training step: on this machine, compared with plain JAX, and with PyTorch? (For a TPU: xl2_step.)

    python -m benchmarks.train_step [--save docs/results/benchmark_train_step.json]
    .venv-parity/bin/python -m benchmarks.train_step --vs-torch [--save docs/results/benchmark_train_step_vs_torch.json]

here         DiT-S/2, float32, 8 images, the training job's own step, on the devices that JAX finds (the CPU, or any
             accelerator). The reference is its forward pass.
accelerator  If there is one: DiT-XL/2 in bfloat16 with 32 images and the shipped rematerialisation, one program after
             the other: without recursion, the same with XLA attention, and T = 2 in three blocks. The reference is the
             first.
dispatch     A tiny DiT, whose step is mostly overhead. The reference is benchmarks/plain_dit.py, which computes the
             same. Target: at most 1.5 times its time.
--vs-torch   DiT-S/2, float32, 8 images, rectified flow, AdamW and one EMA, no rematerialisation, compared with an equal
             PyTorch model with one thread per core, both eager and, if it works, with torch.compile. Targets: 2.0 times
             the speed of eager PyTorch in the forward pass, 1.3 in the training step. products_alone is the speed of a
             program of nothing but the products, each as fast as the MLP's first product alone in the faster library.

Programs that are compared run in turns (except for accelerator), and ratios are medians over the turns.
"""

import argparse
import dataclasses
import math
import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plain_dit
from benchmarks.measure import (
    interleaved_seconds,
    median_ratio,
    progress,
    report,
    rounded,
)
from benchmarks.recursion import PLACES, base_flops, experiment, timed_step
from trm_diffusion.config import default_config, resolve
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.runtime.parameters import count

MOST_DISPATCH, LEAST_FORWARD, LEAST_STEP = 1.5, 2.0, 1.3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Problem sizes; the tests use smaller ones."""

    model: str = "S/2"
    depth: int = 12
    images: int = 8
    repeats: int = 7
    calls: int = 100  # steps of the tiny model in one turn


def size_of(sizes: Sizes, **model) -> Experiment:
    return experiment(sizes.model, "none", 1, sizes.images, dtype="float32", depth=sizes.depth, **model)


def here(sizes: Sizes) -> dict:
    built = size_of(sizes)
    config, images = built.config, sizes.images
    shape = (images, config.data.image_size, config.data.image_size, config.data.channels)
    inputs = jax.random.normal(jax.random.key(0), shape), jnp.full(images, 500.0), jnp.arange(images)
    parameters = built.init_state().parameters
    forward = jax.jit(lambda parameters, *inputs: built.model.bind(parameters)(*inputs)[0])
    programs = {"forward": lambda: forward(parameters, *inputs), "train_step": timed_step(built)}
    seconds = interleaved_seconds(programs, sizes.repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "model": f"DiT-{sizes.model}, {config.model.depth} blocks, float32, {images} images",
        "seconds": median,
        "images_per_second": images / median["train_step"],
        "model_flops_per_second": base_flops(built) / median["train_step"],
        "train_step_over_forward": median_ratio(seconds["train_step"], seconds["forward"]),
    }


ON_ACCELERATOR = {  # name -> whether blocks recurse (T = 2), further fields of the model
    "without_recursion": (False, {}),
    "attention_by_xla": (False, {"attention": "xla"}),
    "three_blocks_T2": (True, {}),
}


def accelerator(sizes: Sizes, steps: int = 4, blocks: str = PLACES["XL/2"]["three"], **model) -> dict:
    """Times training steps of a model that fills the accelerator, `steps` of them per turn."""
    rows = {}
    for name, (recursive, fields) in ON_ACCELERATOR.items():
        built = experiment(sizes.model, blocks if recursive else "none", 2, sizes.images, **fields, **model)
        run = timed_step(built)
        jax.block_until_ready([run() for _ in range(3)])
        turn = {"turn": lambda run=run: [run() for _ in range(steps)][-1]}
        times = [seconds / steps for seconds in interleaved_seconds(turn, sizes.repeats)["turn"]]
        seconds = statistics.median(times)
        rows[name] = {
            "milliseconds": 1e3 * seconds,
            "milliseconds_range": [1e3 * min(times), 1e3 * max(times)],
            "images_per_second": sizes.images / seconds,
            "model_teraflops_per_second": base_flops(built) / seconds / 1e12,
            "peak_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        }
        progress(f"{name}: {rows[name]}")
    first = rows["without_recursion"]["milliseconds"]
    return {
        "device": jax.devices()[0].device_kind,
        "model": f"DiT-{sizes.model}, {built.config.model.dtype}, {sizes.images} images",
        "rows": {name: {**row, "over_without_recursion": row["milliseconds"] / first} for name, row in rows.items()},
    }


class TinyPrograms:
    """The training step of a tiny DiT, ours and the plain one, with the same parameters and batch."""

    def __init__(self):
        c = default_config()
        c.model.update(depth=2, width=32, heads=2, patch=4, dtype="float32")
        c.model.recursion.blocks = "none"
        c.data.update(image_size=8, channels=1, num_classes=10)
        c.train.batch_size = c.sample.batch_size = 8
        built = build(resolve(c))
        rng = np.random.default_rng(0)
        self._images = jnp.asarray(rng.standard_normal((8, 8, 8, 1), np.float32))
        self._labels = jnp.asarray(rng.integers(0, 10, 8), jnp.int32)
        self.state, self._step = built.init_state(), make_train_step(built)
        self.plain_state = plain_dit.initial_state(self.state.parameters)
        self._plain_step = plain_dit.make_train_step(
            patch=c.model.patch, heads=c.model.heads, null_label=c.data.num_classes
        )

    def ours(self, calls: int) -> jax.Array:
        """Runs `calls` steps; returns the last loss."""
        for _ in range(calls):
            self.state, metrics = self._step(self.state, {"image": self._images, "label": self._labels})
        return metrics["loss"]

    def plain(self, calls: int) -> jax.Array:
        for _ in range(calls):
            self.plain_state, loss = self._plain_step(self.plain_state, self._images, self._labels)
        return loss


def dispatch(programs: TinyPrograms, sizes: Sizes) -> dict:
    seconds = interleaved_seconds(
        {"ours": lambda: programs.ours(sizes.calls), "plain_jax": lambda: programs.plain(sizes.calls)}, sizes.repeats
    )
    ratio = median_ratio(seconds["ours"], seconds["plain_jax"])
    return {
        "model": "DiT, 2 blocks of width 32, 4 tokens, 8 images",
        "microseconds": {name: 1e6 * statistics.median(times) / sizes.calls for name, times in seconds.items()},
        "ours_over_plain_jax": ratio,
        "pass": ratio <= MOST_DISPATCH,
    }


def vs_torch(sizes: Sizes) -> dict:
    """Compares our forward pass and training step with PyTorch's, on the CPU."""
    from benchmarks.torch_dit import TorchPrograms

    # Both predict the rectified flow's velocity, with as many output channels as input channels.
    c = size_of(sizes, remat="none").config
    flow = dataclasses.replace(c.diffusion, objective="rectified_flow", learned_sigma=False)
    sample = dataclasses.replace(c.sample, sampler="euler")
    built = build(dataclasses.replace(c, diffusion=flow, sample=sample))
    model, data = built.config.model, built.config.data
    torch_programs = TorchPrograms(
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        patch=model.patch,
        size=data.image_size,
        channels=data.channels,
        classes=data.num_classes,
        images=sizes.images,
    )
    parameters = built.init_state().parameters
    assert count(parameters) == torch_programs.parameters, "the two models are not equal"
    forward = jax.jit(lambda parameters, *inputs: built.model.bind(parameters)(*inputs)[0])
    shape = (sizes.images, data.image_size, data.image_size, data.channels)
    inputs = jax.random.normal(jax.random.key(0), shape), jnp.full(sizes.images, 500.0), jnp.arange(sizes.images)
    result = {"parameters": count(parameters), **torch_programs.about}
    programs = {
        "forward": {"ours": lambda: forward(parameters, *inputs), **torch_programs.forward},
        "train_step": {"ours": timed_step(built), **torch_programs.train_step},
    }
    for what, of_each in programs.items():
        seconds = interleaved_seconds(of_each, sizes.repeats)
        result[what] = {
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "speed_over": {name: median_ratio(seconds[name], seconds["ours"]) for name in of_each if name != "ours"},
        }
        progress(f"{what}: {result[what]}")
    rate = products_per_second(sizes, model.width, (data.image_size // model.patch) ** 2)
    result["products_alone"] = {
        "flops_per_second": rate,
        "speed_over_pytorch": {
            what: result[what]["seconds"]["pytorch"] * rate / flops
            for what, flops in (("forward", base_flops(built) / 3), ("train_step", base_flops(built)))
        },
    }
    result["met"] = {
        f"forward at least {LEAST_FORWARD}": result["forward"]["speed_over"]["pytorch"] >= LEAST_FORWARD,
        f"train step at least {LEAST_STEP}": result["train_step"]["speed_over"]["pytorch"] >= LEAST_STEP,
    }
    return {**result, "pass": all(result["met"].values())}


def products_per_second(sizes: Sizes, width: int, tokens: int) -> float:
    """FLOP/s of the MLP's first product alone, in the faster of JAX and PyTorch."""
    import torch

    rng, shapes = np.random.default_rng(0), ((sizes.images * tokens, width), (width, 4 * width))
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    ours, theirs = [jnp.asarray(x) for x in arrays], [torch.from_numpy(x) for x in arrays]
    product = jax.jit(jnp.matmul)
    programs = {"ours": lambda: product(*ours), "pytorch": lambda: torch.matmul(*theirs)}
    seconds = interleaved_seconds(programs, 10 * sizes.repeats)
    return 2 * math.prod(shapes[0]) * 4 * width / min(map(statistics.median, seconds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs-torch", action="store_true", help="compare with PyTorch, in the parity environment")
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    sizes = Sizes()
    if arguments.vs_torch:
        jax.config.update("jax_platforms", "cpu")
        result = {"command": "python -m benchmarks.train_step --vs-torch", **vs_torch(sizes)}
    else:
        result = {"here": here(sizes), "dispatch": dispatch(TinyPrograms(), sizes)}
        if jax.default_backend() != "cpu":
            result["accelerator"] = accelerator(Sizes(model="XL/2", images=32))
        result["pass"] = result["dispatch"]["pass"]
    report("train_step", rounded({"cores": os.cpu_count(), **result}), arguments.save)


if __name__ == "__main__":
    main()
