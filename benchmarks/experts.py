"""Cost of dispatching tokens to experts, forward and backward, for every implementation.

The measure is the time relative to an ideal: plain matmuls of the same low-rank updates for each token's k experts, all
with the weights of one expert, with no routing and no wasted work. CPU times are measured. TPU times, if libtpu is
installed, are the compiler's estimate (`optimal_seconds`); it may choose the layouts of inputs and outputs. Routing is
random, as with a fresh gate.

Targets: `auto` takes at most 1.1 times the best implementation's time everywhere, and with 2 experts at most 0.8 of the
time of one-hot dispatch and combine products.

    python -m benchmarks.experts [--save docs/results/benchmark_experts.json]
"""

import argparse
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from benchmarks.measure import (
    interleaved_seconds,
    measured_for_tpu,
    median_ratio,
    progress,
    report,
    rounded,
    tpu_device,
)
from trm_diffusion.models.recursion.assignment import assign, expert_capacity
from trm_diffusion.models.recursion.config import DISPATCH, PROJECTIONS
from trm_diffusion.models.recursion.dispatch import cheapest_dispatch, expert_updates
from trm_diffusion.models.recursion.gate import Routing

EXPERTS = (2, 5, 16)
WIDTH, RANK = 1152, 128  # DiT-XL's width, the paper's rank
IMAGES_PER_GROUP, TOKENS_PER_IMAGE = 8, 256
GROUP_TOKENS = IMAGES_PER_GROUP * TOKENS_PER_IMAGE
CPU_TOKENS, TPU_TOKENS = 4096, 8192
CPU_REPEATS = 9
IDEAL = "ideal"
MOST_OVER_BEST, MOST_OVER_ONE_HOT = 1.1, 0.8


def capacity_of(experts: int) -> int:
    return expert_capacity(GROUP_TOKENS, experts, experts_per_token=1, capacity_factor=1.25)


def inputs(experts: int, tokens: int, dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    images, groups = tokens // TOKENS_PER_IMAGE, tokens // GROUP_TOKENS
    logits = normal(images, TOKENS_PER_IMAGE, 1, experts)
    probabilities = np.asarray(jax.nn.softmax(logits / 5.0))
    return {
        "h": normal(groups, GROUP_TOKENS, WIDTH).astype(dtype),
        "down": (WIDTH**-0.5 * normal(PROJECTIONS, experts, RANK, WIDTH)).astype(dtype),
        "up": (RANK**-0.5 * normal(PROJECTIONS, experts, RANK, WIDTH)).astype(dtype),
        "weights": np.ones((images, TOKENS_PER_IMAGE, 1, 1), np.float32),
        "experts": np.argmax(logits, axis=-1)[..., None].astype(np.int32),
        "probabilities": probabilities,
        "logits": logits,
        "cotangent": normal(groups, GROUP_TOKENS, PROJECTIONS, WIDTH).astype(dtype),
    }


def program(dispatch: str, experts: int) -> Callable[[dict], tuple]:
    """A jitted function of the inputs: updates and their gradients, including the assignment of tokens to experts."""

    def ideal(h, down, up, weights):
        groups, tokens, width = h.shape
        low = jnp.split(h.reshape(-1, width) @ down[:, 0].reshape(-1, width).T, PROJECTIONS, axis=-1)
        updates = [low_tr @ up_rd for low_tr, up_rd in zip(low, up[:, 0], strict=True)]
        return jnp.stack(updates, axis=1).reshape(groups, tokens, PROJECTIONS, width)

    def run(x: dict):
        def dispatched(h, down, up, weights):
            capacity = capacity_of(experts)
            routing = Routing(x["experts"], weights, x["probabilities"], x["logits"])
            return expert_updates(h, down, up, assign(routing, IMAGES_PER_GROUP, capacity), capacity, dispatch)

        function = ideal if dispatch == IDEAL else dispatched
        updates, backward = jax.vjp(function, x["h"], x["down"], x["up"], x["weights"])
        return updates, backward(x["cotangent"])

    return jax.jit(run)


def on_cpu(experts: int) -> dict:
    arrays = jax.tree.map(jnp.asarray, inputs(experts, CPU_TOKENS, np.float32))
    programs = {name: functools.partial(program(name, experts), arrays) for name in (IDEAL, *DISPATCH)}
    seconds = interleaved_seconds(programs, CPU_REPEATS)
    return {
        name: {
            "time_ratio_to_ideal": median_ratio(times, seconds[IDEAL]),
            "median_seconds": float(np.median(times)),
        }
        for name, times in seconds.items()
    }


def on_tpu(experts: int) -> dict:
    chosen_layout = Format(Layout.AUTO, SingleDeviceSharding(tpu_device()))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        inputs(experts, TPU_TOKENS, jnp.bfloat16),
    )
    rows = {}
    for name in (IDEAL, *DISPATCH):
        jitted = jax.jit(program(name, experts), in_shardings=chosen_layout, out_shardings=chosen_layout)
        compiled = jitted.lower(shapes).compile()
        cost = compiled.cost_analysis()
        rows[name] = {
            "optimal_seconds": cost["optimal_seconds"],
            "flops": cost["flops"],
            "bytes_accessed": cost["bytes accessed"],
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        progress(f"v5p, {experts} experts, {name}: {rows[name]}")
    for row in rows.values():
        row["time_ratio_to_ideal"] = row["optimal_seconds"] / rows[IDEAL]["optimal_seconds"]
    return rows


def judged(platform: str, experts: int, rows: dict) -> dict:
    """The rows of one platform and number of experts, with the figures for the targets and whether they are met."""
    ratio = {name: row["time_ratio_to_ideal"] for name, row in rows.items() if name != IDEAL}
    best = min((name for name in ratio if name != "auto"), key=ratio.get)
    over_best, over_one_hot = ratio["auto"] / ratio[best], ratio["auto"] / ratio["one_hot"]
    holds = over_best <= MOST_OVER_BEST and (experts != 2 or over_one_hot <= MOST_OVER_ONE_HOT)
    return {
        "implementations": rows,
        "auto_is": cheapest_dispatch(platform, GROUP_TOKENS, experts, capacity_of(experts), 1, RANK),
        "best": best,
        "auto_over_best_time_ratio": over_best,
        "auto_over_one_hot_time_ratio": over_one_hot,
        "pass": holds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    parser.add_argument("--tpu", action="store_true", help=argparse.SUPPRESS)  # the child process with libtpu
    arguments = parser.parse_args()
    if arguments.tpu:
        print(json.dumps({str(experts): on_tpu(experts) for experts in EXPERTS}))
        return

    cpu = {}
    for experts in EXPERTS:
        cpu[str(experts)] = judged("cpu", experts, on_cpu(experts))
        progress(f"cpu, {experts} experts: {cpu[str(experts)]}")
    tpu = measured_for_tpu("benchmarks.experts")
    if "not_measured" not in tpu:
        tpu = {experts: judged("tpu", int(experts), rows) for experts, rows in tpu.items()}
    verdicts = [entry["pass"] for entry in (*cpu.values(), *tpu.values()) if isinstance(entry, dict)]
    result = {
        "setting": f"width {WIDTH}, rank {RANK}, k 1, capacity factor 1.25, groups of {GROUP_TOKENS} tokens; "
        f"cpu: {CPU_TOKENS} tokens, float32; tpu_v5p_compiler: {TPU_TOKENS} tokens, bfloat16",
        "cpu_by_experts": cpu,
        "tpu_v5p_compiler_by_experts": tpu,
        "pass": all(verdicts),
    }
    report("experts", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
