"""Time and memory that recursion adds to a training step, compared with the FLOPs it has to add.

The step is the training job's own, including optimiser and EMA. On the CPU it is DiT-S/2, measured. For a TPU v5p it is
DiT-XL/2 in bfloat16 with 32 images and the attention kernel; the time is the compiler's estimate (`optimal_seconds`),
if libtpu is installed. The estimate counts a loop body once, so the TPU programs have blocks and latent steps unrolled.
A step's time is then the sum over its blocks, and a block's the sum over its latent steps. It is composed from programs
of one and two blocks with T = 1, 2 and 3, and checked against a program with more blocks. Memory, program size and
compile time are those of the program as shipped, at full depth, in loops. Each program is compiled in its own process,
so that none reuses what another left behind.

Forward FLOPs that recursion adds per visual token and block, for M experts of rank r, k experts per token, N tokens per
image and width D, two FLOPs per multiply-add:

    adapters   12 k r D   three maps D -> r -> D, for every latent step
    gate       2 P M D    logits from the token, for every latent step, with P choices (1, or 3 if per projection)
    attention  4 N D      q k^T and the product with v, for the T - 1 intermediate latent steps

The analytic extra is three times these FLOPs (one forward and two backward products for each) over the FLOPs of the
step without recursion, likewise three times its forward FLOPs. The extra with recomputation is listed too: under the
shipped policy (`remat` full) the backward pass first recomputes each intermediate latent step. It leaves out the
product with v, which no gradient needs, and, if there is only one such step, the adapters and gate, which are saved.
Neither counts tokens that an expert computes but does not take, unused capacity, padding or elementwise work.

For each operation, the estimate takes the longer of its products and its memory traffic, and sums them. It also adds
copies between HBM and vector memory, although these run in parallel with other work.

Targets: the extra time is at most 1.5 times the analytic extra, both relative to the step without recursion; DiT-XL/2
with T = 2 in three blocks takes at most 5% longer; temporary memory grows by less than 10% from T = 2 to T = 5; neither
program size nor compile time grows with T or with depth.

    python -m benchmarks.recursion [--save docs/results/benchmark_recursion.json]
"""

import argparse
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    interleaved_seconds,
    measured_for_tpu,
    median_ratio,
    progress,
    report,
    rounded,
    tpu_device,
)
from trm_diffusion.config import resolve
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.models.dit import SIZES
from trm_diffusion.models.embed import TIMESTEP_FREQUENCIES
from trm_diffusion.models.recursion.config import recursive_blocks

LATENT_STEPS = (1, 2, 5)
PLACES = {"S/2": {"three": "3,6,9", "all": "all"}, "XL/2": {"three": "4,8,12", "all": "all"}}
CPU_IMAGES, TPU_IMAGES, CPU_REPEATS = 8, 32, 9
OFF = "off"
MOST_OVER_FLOPS, MOST_EXTRA, MOST_MEMORY_GROWTH, MOST_COMPILE_GROWTH = 1.5, 0.05, 0.10, 0.25


def experiment(
    size: str, blocks: str, latent_steps: int, images: int, device: jax.Device | None = None, **model
) -> Experiment:
    """The ImageNet experiment with these recursive blocks, for one described device or the default devices.

    model: further fields of the model's config.
    """
    c = importlib.import_module("configs.imagenet256").get_config(f"model={size},recursion=off,T={latent_steps}")
    c.train.batch_size = images
    c.model.update(model)
    c.model.recursion.blocks = blocks
    return build(resolve(c), None if device is None else [device])


def lowered_step(built: Experiment) -> jax.stages.Lowered:
    return make_train_step(built).lower(built.abstract_state, built.abstract_batch(built.config.train.batch_size))


def base_flops(built: Experiment) -> float:
    """FLOPs of one training step without recursion."""
    config, data = built.config.model, built.config.data
    d, n = config.width, (data.image_size // config.patch) ** 2
    patch_in, patch_out = (config.patch**2 * c for c in (data.channels, built.objective.output_channels(data.channels)))
    # Per block: q, k, v, output and MLP; the two attention products; for each image, six modulations.
    blocks = config.depth * (n * (8 + 4 * config.mlp_ratio) * d**2 + 4 * n**2 * d + 12 * d**2)
    ends = 2 * n * d * (patch_in + patch_out) + 4 * d**2 + 2 * d * (TIMESTEP_FREQUENCIES + d)
    return 3 * built.config.train.batch_size * (blocks + ends)


def extra_flops(built: Experiment) -> tuple[float, float]:
    """FLOPs that recursion adds to one training step: without and with recomputation."""
    config, data = built.config.model, built.config.data
    recursion, d, n = config.recursion, config.width, (data.image_size // config.patch) ** 2
    choices = 3 if recursion.routing_scope == "per_projection" else 1
    routed = 12 * recursion.experts_per_token * recursion.rank * d + 2 * choices * recursion.experts * d
    attention, intermediate = 4 * n * d, recursion.latent_steps - 1
    again = intermediate * (attention / 2 + (routed if intermediate > 1 else 0))
    tokens = built.config.train.batch_size * n * len(recursive_blocks(recursion.blocks, config.depth))
    useful = 3 * tokens * (routed * recursion.latent_steps + attention * intermediate)
    return useful, useful + tokens * again


def comparison(built: Experiment, extra_time: float) -> dict:
    """One row of the result; ratios are relative to the step without recursion."""
    useful, recomputed = (flops / base_flops(built) for flops in extra_flops(built))
    return {
        "extra_time_ratio": extra_time,
        "analytic_extra_ratio": useful,
        "extra_with_recomputation_ratio": recomputed,
        "time_over_analytic": extra_time / useful,
        "pass": extra_time <= MOST_OVER_FLOPS * useful,
    }


def shipped(built: Experiment) -> dict:
    """Compile time, program size and temporary memory of the step as shipped."""
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = lowered_step(built).compile()
    return {
        "compile_cpu_seconds": time.process_time() - cpu,  # over all threads; less affected by a busy machine
        "compile_wall_seconds": time.perf_counter() - wall,
        "hlo_instructions": compiled.as_text().count(" = "),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def growth(rows: dict, name: str, before: str, after: str) -> float:
    return rows[after][name] / rows[before][name] - 1


def by_compiler(depth: int, recursive: int = 0, latent_steps: int = 1) -> dict:
    """Estimated cost of an XL/2 step with `depth` unrolled blocks; the last `recursive` of them recurse."""
    blocks = ",".join(map(str, range(depth - recursive, depth))) or "none"
    unrolled = {"depth": depth, "scan_blocks": False, "remat": "none", "recursion": {"scan_latent_steps": False}}
    built = experiment("XL/2", blocks, latent_steps, TPU_IMAGES, tpu_device(), **unrolled)
    cost = lowered_step(built).compile().cost_analysis()
    if cost["optimal_seconds"] <= 0:  # the compiler has no estimate for some operation
        raise RuntimeError("the compiler has no estimate of the time")
    return {"seconds": cost["optimal_seconds"], "flops": cost["flops"], "bytes": cost["bytes accessed"]}


def shipped_for_tpu(blocks: str, latent_steps: int, depth: int) -> dict:
    return shipped(experiment("XL/2", blocks, latent_steps, TPU_IMAGES, tpu_device(), depth=depth))


def tpu_programs() -> dict[str, Callable[[], dict]]:
    """The programs to compile for the TPU, by name; each returns its cost."""
    depth, places = SIZES["XL"][0], PLACES["XL/2"]
    timed = {"one": (1,), "two": (2,), "T1": (2, 1, 1), "T2": (2, 1, 2), "T3": (2, 1, 3), "more": (3, 2, 3)}
    loops = {f"{place}_T{steps}": (places[place], steps, depth) for place in places for steps in LATENT_STEPS}
    loops |= {OFF: ("none", 1, depth), "all_T5_half_depth": ("all", 5, depth // 2)}
    return {name: functools.partial(by_compiler, *arguments) for name, arguments in timed.items()} | {
        f"shipped_{name}": functools.partial(shipped_for_tpu, *arguments) for name, arguments in loops.items()
    }


def combined(*terms: tuple[float, dict]) -> dict:
    return {name: sum(factor * cost[name] for factor, cost in terms) for name in terms[0][1]}


def on_tpu(costs: dict[str, dict]) -> dict:
    """The result, from the costs of all `tpu_programs`."""
    one, two, depth, size = costs["one"], costs["two"], SIZES["XL"][0], "XL/2"
    block, last = combined((1, two), (-1, one)), combined((1, costs["T1"]), (-1, two))
    kept = combined((1, costs["T2"]), (-1, costs["T1"]))  # the only intermediate latent step
    again = combined((0.5, costs["T3"]), (-0.5, costs["T1"]))  # one of several
    off = combined((1, one), (depth - 1, block))
    predicted, found = combined((1, one), (2, block), (2, last), (4, again)), costs["more"]

    rows = {}
    for place, blocks in PLACES[size].items():
        recursive = len(recursive_blocks(blocks, depth))
        for steps in LATENT_STEPS:
            added = combined((recursive, last), (recursive * (steps - 1), again if steps > 2 else kept))
            extra = {name: added[name] / off[name] for name in off}
            rows[f"{place}_T{steps}"] = {
                **comparison(experiment(size, blocks, steps, TPU_IMAGES), extra["seconds"]),
                "compiler_extra_flops_ratio": extra["flops"],
                "compiler_extra_bytes_ratio": extra["bytes"],
            }
    return {
        "off_seconds": off["seconds"],
        "off_flops_over_analytic": off["flops"] / base_flops(experiment(size, "none", 1, TPU_IMAGES)),
        "block_microseconds": {
            "without_recursion": 1e6 * block["seconds"],
            "last_latent_step_adds": 1e6 * last["seconds"],
            "only_intermediate_latent_step_adds": 1e6 * kept["seconds"],
            "each_of_several_intermediate_latent_steps_adds": 1e6 * again["seconds"],
        },
        "error_of_sum": {name: predicted[name] / found[name] - 1 for name in found},
        "rows": rows,
        "shipped": {name.removeprefix("shipped_"): cost for name, cost in costs.items() if "shipped_" in name},
    }


def measured_programs() -> dict:
    """The result for the TPU, each program compiled in its own process; {"not_measured": why} without libtpu."""
    costs = {}
    for name in tpu_programs():
        costs[name] = measured_for_tpu("benchmarks.recursion", name)
        progress(f"v5p, {name}: {costs[name]}")
        if "not_measured" in costs[name]:
            return costs[name]
    return judged(on_tpu(costs), MOST_EXTRA)


def timed_step(built: Experiment) -> Callable[[], dict]:
    """A function that runs the next training step at each call and returns its metrics."""
    rng, state, step = np.random.default_rng(0), built.init_state(), make_train_step(built)
    shape = built.abstract_batch(built.config.train.batch_size)["image"].shape
    batch = {
        "image": jnp.asarray(rng.standard_normal(shape, np.float32)),
        "label": jnp.asarray(rng.integers(0, built.config.data.num_classes, shape[:1], np.int32)),
    }

    def run():
        nonlocal state
        state, metrics = step(state, batch)  # the state is donated
        return metrics

    return run


def on_cpu() -> dict:
    size, settings = "S/2", {OFF: experiment("S/2", "none", 1, CPU_IMAGES, dtype="float32")}
    for place, blocks in PLACES[size].items():
        for steps in LATENT_STEPS:
            settings[f"{place}_T{steps}"] = experiment(size, blocks, steps, CPU_IMAGES, dtype="float32")
    programs = {}
    for name, built in settings.items():
        programs[name] = shipped(built)
        progress(f"cpu, {name}: {programs[name]}")
    seconds = interleaved_seconds({name: timed_step(built) for name, built in settings.items()}, CPU_REPEATS)
    progress(f"cpu, seconds: { ({name: statistics.median(times) for name, times in seconds.items()}) }")
    rows = {
        name: comparison(built, median_ratio(seconds[name], seconds[OFF]) - 1)
        for name, built in settings.items()
        if name != OFF
    }
    return {"off_seconds": statistics.median(seconds[OFF]), "rows": rows, "shipped": programs}


def judged(measured: dict, most_extra: float | None = None) -> dict:
    """The measurements on one platform, with growth and the targets met."""
    rows, programs = measured["rows"], measured["shipped"]
    temp = {place: growth(programs, "temp_bytes", f"{place}_T2", f"{place}_T5") for place in ("three", "all")}
    size = {"T2_to_T5": ("all_T2", "all_T5")}
    if "all_T5_half_depth" in programs:
        size["half_depth_to_full"] = ("all_T5_half_depth", "all_T5")
    size = {
        step: {name: growth(programs, name, *ends) for name in ("hlo_instructions", "compile_cpu_seconds")}
        for step, ends in size.items()
    }
    met = {
        "time_at_most_1.5_of_analytic": all(row["pass"] for row in rows.values()),
        "temp_memory_grows_less_than_10_percent": max(temp.values()) < MOST_MEMORY_GROWTH,
        "size_and_compile_time_do_not_grow": all(
            value < MOST_COMPILE_GROWTH for values in size.values() for value in values.values()
        ),
    }
    if most_extra is not None:
        met["three_blocks_T2_at_most_5_percent"] = rows["three_T2"]["extra_time_ratio"] <= most_extra
    return {
        **measured,
        "temp_growth_T2_to_T5_ratio": temp,
        "growth_ratio": size,
        "met": met,
        "pass": all(met.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    parser.add_argument("--tpu", choices=tpu_programs(), help=argparse.SUPPRESS)  # the child process with libtpu
    arguments = parser.parse_args()
    if arguments.tpu:
        print(json.dumps(tpu_programs()[arguments.tpu]()))
        return

    cpu = judged(on_cpu())
    tpu = measured_programs()
    result = {
        "setting": "rank 128, M 2, k 1, capacity factor 1.25, the imagenet256 training step with its optimiser; "
        f"cpu_by_the_clock: DiT-S/2, float32, {CPU_IMAGES} images, interleaved medians of {CPU_REPEATS}; "
        f"tpu_v5p_by_the_compiler: DiT-XL/2, bfloat16, {TPU_IMAGES} images, its estimate, nothing was run",
        "cpu_by_the_clock": cpu,
        "tpu_v5p_by_the_compiler": tpu,
        "pass": cpu["pass"] and tpu.get("pass", True),
    }
    report("recursion", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
