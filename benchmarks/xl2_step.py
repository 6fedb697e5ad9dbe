"""DiT-XL/2's training step on one TPU v5p chip, and its attention, by the TPU compiler; nothing is run.

The step is the training job's own, including optimiser and EMA: no recursion, bfloat16, 32 images. Time is the
compiler's estimate (`optimal_seconds`). It sums the operations one after another, and counts an operand that is
prefetched four times; so do the bytes. The blocks are unrolled, since a loop body would count once. A step's cost is
linear in the number of blocks, so it is composed from programs of one and two blocks, and checked against one of three.
Compile time is that of the step as shipped, at full depth, with its blocks in one scan. Its cycles are also the
compiler's estimates of the operations, with every iteration of a loop counted.

The attention table compares the implementations at the lengths that matter, forward and backward. JAX declares no cost
for splash attention, so its estimates leave out its products, and only its memory can be compared.

    python -m benchmarks.xl2_step [--save docs/results/benchmark_xl2_step.json]
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.measure import measured_for_tpu, progress, report, rounded, tpu_device
from benchmarks.recursion import combined, experiment, lowered_step
from trm_diffusion.analysis.hlo import program_cost
from trm_diffusion.models.attention import chosen_for_tpu, dot_product_attention
from trm_diffusion.models.dit import SIZES

SIZE, DEPTH, IMAGES = "XL/2", SIZES["XL"][0], 32
TIME, BYTES, TEMPORARIES = "estimated_milliseconds", "gigabytes_accessed", "temporary_gigabytes"
UNROLLED_TARGETS = {TIME: 92.0, BYTES: 132.0, TEMPORARIES: 8.3}  # with remat none
SHIPPED_TARGETS = {TIME: 112.0, TEMPORARIES: 4.5}  # with the remat of configs/imagenet256.py
COMPILE_SECONDS = 20.0
ATTENTION = {  # name: images, tokens, heads, head size
    "dit_xl2_256_pixels": (32, 256, 16, 72),
    "sd3_512_pixels": (8, 1357, 24, 64),
    "sd3_1024_pixels": (4, 4429, 24, 64),
}


def figures(compiled: jax.stages.Compiled) -> dict:
    cost = compiled.cost_analysis()
    return {
        TIME: cost["optimal_seconds"] * 1e3,
        BYTES: cost["bytes accessed"] / 1e9,
        TEMPORARIES: compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "teraflops": cost["flops"] / 1e12,
    }


def unrolled(device: jax.Device, depth: int, remat: str) -> dict:
    """The figures of a step with `depth` unrolled blocks."""
    built = experiment(SIZE, "none", 1, IMAGES, device, depth=depth, scan_blocks=False, remat=remat)
    found = figures(lowered_step(built).compile())
    progress(f"{depth} blocks, remat {remat}: {found}")
    return found


def composed(depth: int, one: dict, two: dict) -> dict:
    """The figures of a step of any depth, extrapolated from one and two blocks."""
    return combined((2 - depth, one), (depth - 1, two))


def scanned(device: jax.Device) -> dict:
    """Compile time, temporary memory and cycles of the step as shipped."""
    lowered = lowered_step(experiment(SIZE, "none", 1, IMAGES, device))
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    seconds = {"compile_seconds": time.perf_counter() - wall, "compile_cpu_seconds": time.process_time() - cpu}
    cycles = program_cost(compiled.as_text()).cycles
    return {**seconds, TEMPORARIES: figures(compiled)[TEMPORARIES], "estimated_megacycles": cycles / 1e6}


def attention(device: jax.Device, shape: tuple[int, ...]) -> dict:
    """Each implementation's figures at one shape, forward and backward, and which one auto chooses."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))

    def row(implementation: str) -> dict:
        def loss(q, k, v):
            attended = dot_product_attention(q, k, v, implementation=implementation)
            return jnp.sum(attended.astype(jnp.float32))

        found = figures(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile())
        progress(f"attention {shape}, {implementation}: {found}")
        return {TEMPORARIES: found[TEMPORARIES]} if implementation == "splash" else found

    applying = [name for name in ("xla", "fused", "splash") if chosen_for_tpu(name, x, x) == name]
    return {"auto": chosen_for_tpu("auto", x, x), **{name: row(name) for name in applying}}


def on_tpu() -> dict:
    device = tpu_device()
    shipped = experiment(SIZE, "none", 1, IMAGES).config.model.remat
    parts = {remat: [unrolled(device, depth, remat) for depth in (1, 2)] for remat in ("none", shipped)}
    rows = {remat: composed(DEPTH, *found) for remat, found in parts.items()}
    three, predicted = unrolled(device, 3, shipped), composed(3, *parts[shipped])
    error = {name: predicted[name] / three[name] - 1 for name in three}
    as_shipped = scanned(device)
    met = {
        **{f"none_{name}": rows["none"][name] <= most for name, most in UNROLLED_TARGETS.items()},
        **{f"{shipped}_{name}": rows[shipped][name] <= most for name, most in SHIPPED_TARGETS.items()},
        "compile_seconds": as_shipped["compile_seconds"] <= COMPILE_SECONDS,
    }
    return {
        "remat": rows,
        "shipped_remat": shipped,
        "error_of_sum_ratio": error,
        "scanned": as_shipped,
        "attention": {name: attention(device, shape) for name, shape in ATTENTION.items()},
        "met": met,
        "pass": all(met.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    parser.add_argument("--tpu", action="store_true", help=argparse.SUPPRESS)  # the child process with libtpu
    arguments = parser.parse_args()
    if arguments.tpu:
        print(json.dumps(on_tpu()))
        return
    report("xl2_step", rounded(measured_for_tpu("benchmarks.xl2_step")), arguments.save)


if __name__ == "__main__":
    main()
