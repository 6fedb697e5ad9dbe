"""The compile job: compiles the real training or sampling step for a TPU pod, without needing the pod.

It shows what fits before a pod is rented. The compiler runs in its own process (runtime/libtpu.py), which runs this
module as a program; the last line of output is one JSON object.

    memory        GiB per device by kind, and the capacity available to a program; the state by its parts
    flops         per device in one update (or one batch of samples), from the compiled program with loop bodies
                  multiplied by their trip counts (analysis/hlo.py). model_flops counts only what the equations need:
                  no recomputation, no work duplicated across devices
    collectives   bytes that one device sends, by kind
    seconds       arithmetic: cycles estimated by the compiler, plus the declared costs of custom kernels; collectives:
                  bytes over the published link bandwidth; step: their sum, assuming no overlap
    mfu           model_flops divided by the chip's peak FLOPs in `step` seconds
    compiler_analysis   the compiler's own totals, which count each loop body once
"""

import dataclasses
import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections

from trm_diffusion.analysis.flops import UnknownTurns, forward_flops
from trm_diffusion.analysis.hlo import Cost, largest_arrays, program_cost
from trm_diffusion.conditions import NOTHING, make_condition
from trm_diffusion.config import Config, resolve, to_dict
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.jobs.sample import make_sample_program
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.runtime.libtpu import run_with_libtpu
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import device_bytes
from trm_diffusion.runtime.sharding import batch_sharding, batch_shards
from trm_diffusion.runtime.topology import GIB, Topology, described_devices, parse_topology

LARGEST = 6  # number of arrays to list
MEMORY_FRACTION = 0.9  # fraction of the memory that the advice tries to stay within


def compile_ahead(config: Config, topology: str, slices: int = 1, job: str = "train") -> bool:
    """Compiles a step, prints the report as one line of JSON, and returns whether the step fits.

    job: train or sample. Raises UserError for a topology that does not exist, or if no compiler is available.
    """
    report = compiler_report(config, topology, slices, job, install=True)
    for line in _summary(report):
        say(line)
    print(json.dumps(report), flush=True)
    return report["fits"]


def compiler_report(config: Config, topology: str, slices: int, job: str, *, install: bool) -> dict:
    """The report of one step; install: install libtpu if it is missing. Raises UserError like `compile_ahead`."""
    pod = parse_topology(topology, slices)
    of_slices = f" in {slices} slices" if slices > 1 else ""
    say(f"compiling the {job} step for {pod.chips} {pod.generation} chips{of_slices}; this may take minutes")
    request = {"config": to_dict(config), "topology": topology, "slices": slices, "job": job}
    return run_with_libtpu(["-m", __spec__.name], request, install=install)


def _summary(report: dict) -> list[str]:
    """The report in lines for people."""
    memory = report["memory_gib_per_device"]
    verdict = "fits" if report["fits"] else "does NOT fit"
    needs = "" if memory["total"] is None else f"{memory['total']} of "
    lines = [f"{verdict}: {needs}{memory['capacity']} GiB on each of {report['devices']} devices"]
    if report["compiler_says"]:
        lines.append(f"the compiler says: {report['compiler_says']}")
    if report["fits"]:
        seconds = report["seconds"]
        lines.append(
            f"about {seconds['step']:.4g} s, of which {seconds['collectives']:.4g} s are collectives"
            + (f"; predicted MFU {report['mfu']:.1%}" if report["mfu"] else "")
        )
    return lines + [f"try {entry['flag']}: {entry['why']}" for entry in report["advice"]]


def report_on(config: Config, topology: Topology, job: str) -> dict:
    """The report of `compile_ahead`, made inside the process that runs the compiler."""
    condition = make_condition(config, reads=NOTHING)
    experiment = build(config, described_devices(topology), condition=condition)
    lowered = lowered_step(experiment, job)
    failure = compiled = None
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failure = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    seconds = time.perf_counter() - start
    memory = memory_report(experiment, topology, job, compiled)
    fits = compiled is not None and memory["total"] <= memory["capacity"]
    state = sum(size for name, size in memory.items() if name.startswith("state_"))
    temporaries = memory.get("temporaries") or gib_in(failure or "")
    report = {
        "job": job,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": experiment.mesh.size,
        "mesh": dict(experiment.mesh.shape),
        "batch_size": (config.train if job == "train" else config.sample).batch_size,
        "fits": fits,
        "memory_gib_per_device": memory,
        "largest_of_state": largest_of_state(experiment, job),
        "compile_seconds": seconds,
        "compiler_says": failure,
        "advice": [] if fits else advice(experiment, topology, job, state, temporaries),
    }
    if compiled is None:
        return report
    text = compiled.as_text()
    cost = program_cost(text, topology.slices)
    report |= {"largest_temporaries": largest_arrays(text, LARGEST), "compiler_analysis": compiler_totals(compiled)}
    return report | cost_report(experiment, topology, job, cost)


def compiler_totals(compiled) -> dict:
    """The compiler's own totals of a step, with each loop body counted once; None for a value it does not give."""
    found = compiled.cost_analysis()
    names = {"flops": "flops", "bytes": "bytes accessed", "seconds": "optimal_seconds"}
    return {name: found[key] if found.get(key, -1) > 0 else None for name, key in names.items()}


def lowered_step(experiment: Experiment, job: str) -> jax.stages.Lowered:
    """The step of a job, lowered for the devices of the experiment's mesh."""
    if job == "train":
        batch = experiment.abstract_batch(experiment.config.train.batch_size)
        return make_train_step(experiment).lower(experiment.abstract_state, batch)
    size = experiment.config.sample.batch_size
    condition = experiment.condition.from_batch(experiment.abstract_batch(size))
    indices = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch_sharding(experiment.mesh))
    return make_sample_program(experiment).lower(experiment.abstract_state.parameters, condition, indices)


def memory_report(experiment: Experiment, topology: Topology, job: str, compiled) -> dict:
    """GiB per device by kind; only the state if the program could not be compiled."""
    state = experiment.abstract_state
    parts = {"parameters": state.parameters}
    if job == "train":
        parts |= {"gradients": state.trainable, "optimiser": state.optimizer, "averages": state.ema}
    report = {"capacity": topology.chip.memory_bytes, "total": None}
    report |= {f"state_{name}": device_bytes(part) for name, part in parts.items()}
    if compiled is not None:
        found = compiled.memory_analysis()
        kinds = {
            "arguments": found.argument_size_in_bytes,
            "outputs": found.output_size_in_bytes,
            "aliased": found.alias_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "code": found.generated_code_size_in_bytes,
        }
        total = sum(kinds.values()) - 2 * kinds["aliased"]
        report |= kinds | {"peak": found.peak_memory_in_bytes, "total": total}
    return {name: None if size is None else round(size / GIB, 3) for name, size in report.items()}


def largest_of_state(experiment: Experiment, job: str) -> list[dict]:
    """The arrays of the state that use the most memory on a device."""
    state = experiment.abstract_state
    leaves = jax.tree_util.tree_leaves_with_path(state if job == "train" else state.parameters)
    sizes = [
        (device_bytes(leaf), jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    largest = sorted(sizes, key=lambda entry: -entry[0])[:LARGEST]
    return [
        {"name": name, "gib": round(size / GIB, 3), "shape": leaf.sharding.shard_shape(leaf.shape)}
        for size, name, leaf in largest
    ]


def cost_report(experiment: Experiment, topology: Topology, job: str, cost: Cost) -> dict:
    """FLOPs, bytes, collectives and predicted times; see the top of this file."""
    chip = topology.chip
    kernels = max(cost.kernel_flops / chip.flops, cost.kernel_bytes / chip.memory_bandwidth)
    arithmetic = cost.cycles / chip.cycles + kernels
    collectives = sum(
        part["bytes"] / (chip.slice_bandwidth if "between" in kind else chip.link_bandwidth)
        for kind, part in cost.collectives.items()
    )
    try:
        wanted = model_flops(experiment, job) / experiment.mesh.size
    except UnknownTurns:  # with halting, the number of latent steps is not known in advance
        wanted = None
    step = arithmetic + collectives
    return {
        "flops_per_device": cost.flops,
        "model_flops_per_device": wanted,
        "bytes_per_device": cost.bytes,
        "collectives_per_device": cost.collectives,
        "loops_counted_once": cost.unknown_loops,
        "seconds": {"arithmetic": arithmetic, "collectives": collectives, "step": step},
        "mfu": wanted and step and wanted / step / chip.flops,
        "peak_flops_per_device": chip.flops,
    }


def model_flops(experiment: Experiment, job: str) -> float:
    """FLOPs that the equations of one step need, over all devices, without rematerialisation."""
    config = experiment.config
    recursion = dataclasses.replace(config.model.recursion, remat="none")
    model = dataclasses.replace(config.model, remat="none", attention="xla", recursion=recursion)
    train = dataclasses.replace(config.train, accumulate=1)
    config = dataclasses.replace(config, model=model, train=train)
    plain = build(config, experiment.mesh.devices.ravel(), condition=experiment.condition)
    if job == "train":
        return forward_flops(make_train_step(plain), plain.abstract_state, plain.abstract_batch(train.batch_size))
    batch = plain.abstract_batch(config.sample.batch_size)
    indices = jax.ShapeDtypeStruct((config.sample.batch_size,), jnp.int32)
    condition = plain.condition.from_batch(batch)
    return forward_flops(make_sample_program(plain), plain.abstract_state.parameters, condition, indices)


def advice(experiment: Experiment, topology: Topology, job: str, state: float, temporaries: float) -> list[dict]:
    """Flags that would reduce the memory of a step, most useful first.

    Of those that reduce temporaries, the smaller batch comes last, because it changes the run.

    state, temporaries: GiB per device; if compilation failed, `temporaries` is what the compiler says it needs.
    """
    config, shards = experiment.config, batch_shards(experiment.mesh)
    per_device = (config.train if job == "train" else config.sample).batch_size // shards
    room = MEMORY_FRACTION * topology.chip.memory_bytes / GIB - state
    smaller_state = [("--topology", f"more chips: {state:.3g} GiB of state on each of these")] if room <= 0 else []
    if experiment.mesh.shape["data"] > topology.slices and config.mesh.fsdp != -1:
        smaller_state.append(("--config.mesh.data=-1 --config.mesh.fsdp=-1", "shards the state as much as possible"))
    if config.train.trainable != "all" and config.train.frozen_dtype == "float32":
        smaller_state.append(("--config.train.frozen_dtype=bfloat16", "halves the memory of non-trainable parameters"))
    if job == "train" and len(config.optim.ema_decays) > 1:
        smaller_state.append((f"--config.optim.ema_decays={config.optim.ema_decays[0]},", "keeps only one EMA"))

    smaller_step = []
    if config.model.attention == "xla":
        smaller_step.append(("--config.model.attention=auto", "attention that does not store its logits"))
    if job == "train":
        if config.model.remat != "full":
            smaller_step.append(("--config.model.remat=full", "stores only each block's inputs; a third more FLOPs"))
        if parts := more_parts(config, per_device, temporaries / max(room, 1e-3)):
            smaller_step.append((f"--config.train.accumulate={parts}", f"{per_device // parts} images at a time"))
    if per_device > 1:
        field = "train" if job == "train" else "sample"
        size = config.train.batch_size if job == "train" else config.sample.batch_size
        changes = "; unlike the others, it changes the run" if job == "train" else ""
        smaller_step.append((f"--config.{field}.batch_size={size // 2}", f"half the images{changes}"))
    found = smaller_state + smaller_step if state > temporaries else smaller_step + smaller_state
    return [{"flag": flag, "why": why} for flag, why in found]


def more_parts(config: Config, per_device: int, times: float) -> int | None:
    """The fewest accumulation parts for `times` less memory, or else the most possible; None if there are none."""
    recursion, parts = config.model.recursion, config.train.accumulate
    group = 1 if recursion.blocks == "none" else recursion.routing_group
    able = [n for n in range(parts + 1, per_device + 1) if per_device % n == 0 and per_device // n % group == 0]
    return next((n for n in able if n >= times * parts), able[-1]) if able else None


def gib_in(text: str) -> float:
    """The first amount of memory in a compiler message, such as "(55.78G)", in GiB; 0 if there is none."""
    found = re.search(r"([\d.]+)([KMGT])", text)
    return float(found[1]) * 2.0 ** {"K": -20, "M": -10, "G": 0, "T": 10}[found[2]] if found else 0.0


def main() -> None:
    """Reads one request from standard input and prints its report; see `compiler_report`."""
    request = json.load(sys.stdin)
    try:
        config = resolve(ml_collections.ConfigDict(request["config"]))
        report = report_on(config, parse_topology(request["topology"], request["slices"]), request["job"])
    except UserError as error:
        report = {"error": str(error)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
