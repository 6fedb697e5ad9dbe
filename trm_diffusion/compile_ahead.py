"""The compile job: the real training or sampling step, compiled for a TPU pod that need not be there.

It says what fits before a pod is rented. The compiler runs in a process of its own (runtime/libtpu.py), which is this
module run as a program; the last line of output is one JSON object.

    memory        GiB on each device, by kind, against what a program may use there; the state by its parts
    flops         of one device in one update (or one batch of samples), bodies of loops as often as they run, from the
                  compiled program (analysis/hlo.py). model_flops are those that the equations ask for: nothing
                  recomputed, nothing done twice on several devices
    collectives   bytes that one device sends, by kind
    seconds       arithmetic: the compiler's own cycles, custom kernels as they declare themselves; collectives: bytes
                  over the published bandwidth of the links. step: their sum, as if nothing overlapped
    mfu           model_flops over what the chip could have done in `step` seconds
"""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections

from trm_diffusion.analysis.flops import forward_flops
from trm_diffusion.analysis.hlo import Cost, largest_arrays, program_cost
from trm_diffusion.build import Experiment, build
from trm_diffusion.config import Config, resolve, to_dict
from trm_diffusion.errors import UserError
from trm_diffusion.runtime.libtpu import run_with_libtpu
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import device_bytes
from trm_diffusion.runtime.sharding import batch_sharding, batch_shards
from trm_diffusion.runtime.topology import GIB, Topology, described_devices, parse_topology
from trm_diffusion.sample import drawer
from trm_diffusion.train import make_train_step

JOBS = ("train", "sample")
LARGEST = 6  # arrays that are named
COMFORT = 0.9  # of the memory that advice aims at


def compile_ahead(config: Config, topology: str, slices: int = 1, job: str = "train") -> bool:
    """Compiles and reports, and prints the JSON line; True if it fits. Raises UserError for a topology that is none, or no compiler."""
    pod = parse_topology(topology, slices)
    of_slices = f" in {slices} slices" if slices > 1 else ""
    say(f"compiling the {job} step for {pod.chips} {pod.generation} chips{of_slices}; this may take minutes")
    request = {"config": to_dict(config), "topology": topology, "slices": slices, "job": job}
    report = run_with_libtpu(["-m", __spec__.name], request, install=True)
    for line in _told(report):
        say(line)
    print(json.dumps(report), flush=True)
    return report["fits"]


def _told(report: dict) -> list[str]:
    memory = report["memory_gib_per_device"]
    verdict = "fits" if report["fits"] else "does NOT fit"
    lines = [f"{verdict}: {memory['total'] or 'more'} of {memory['capacity']} GiB on each device"]
    if report["fits"]:
        seconds = report["seconds"]
        lines.append(
            f"about {seconds['step']:.4g} s, of which {seconds['collectives']:.4g} s are collectives; "
            f"predicted MFU {report['mfu']:.1%}"
        )
    return lines + [f"try {entry['flag']}: {entry['why']}" for entry in report["advice"]]


def report_on(config: Config, topology: Topology, job: str) -> dict:
    """What `compile_ahead` prints, from within the process that holds the compiler."""
    experiment = build(config, described_devices(topology))
    lowered = lowered_step(experiment, job)
    start, failure, compiled = time.perf_counter(), None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failure = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    seconds = time.perf_counter() - start
    memory = memory_report(experiment, topology, job, compiled)
    fits = compiled is not None and memory["total"] <= memory["capacity"]
    report = {
        "job": job,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": dict(experiment.mesh.shape),
        "batch_size": (config.train if job == "train" else config.sample).batch_size,
        "fits": fits,
        "memory_gib_per_device": memory,
        "largest_of_state": largest_of_state(experiment, job),
        "compile_seconds": seconds,
        "compiler_says": failure,
        "advice": [] if fits else advice(experiment, topology, memory, job),
    }
    if compiled is None:
        return report
    text = compiled.as_text()
    cost = program_cost(text, topology.devices_per_slice if topology.slices > 1 else None)
    return (
        report | {"largest_temporaries": largest_arrays(text, LARGEST)} | cost_report(experiment, topology, job, cost)
    )


def lowered_step(experiment: Experiment, job: str) -> jax.stages.Lowered:
    """The step of a job, for the devices of the experiment's mesh, ready to be compiled."""
    if job == "train":
        batch = experiment.abstract_batch(experiment.config.train.batch_size)
        return make_train_step(experiment).lower(experiment.abstract_state, batch)
    size = experiment.config.sample.batch_size
    condition = experiment.condition_of(experiment.abstract_batch(size))
    indices = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch_sharding(experiment.mesh))
    return drawer(experiment).lower(experiment.abstract_state.parameters, condition, indices)


def memory_report(experiment: Experiment, topology: Topology, job: str, compiled) -> dict:
    """GiB on each device, by kind; of a program that could not be compiled the state alone."""
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
    """The arrays of the state that take most memory on a device."""
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
    """FLOPs, bytes, collectives and the time they are predicted to take; see the top of this file."""
    chip = topology.chip
    kernels = max(cost.kernel_flops / chip.flops, cost.kernel_bytes / chip.memory_bandwidth)
    arithmetic = cost.cycles / chip.cycles + kernels
    collectives = sum(
        part["bytes"] / (chip.slice_bandwidth if "between" in kind else chip.link_bandwidth)
        for kind, part in cost.collectives.items()
    )
    wanted = model_flops(experiment, job) / experiment.mesh.size
    step = arithmetic + collectives
    return {
        "flops_per_device": cost.flops,
        "model_flops_per_device": wanted,
        "bytes_per_device": cost.bytes,
        "collectives_per_device": cost.collectives,
        "loops_counted_once": cost.unknown_loops,
        "seconds": {"arithmetic": arithmetic, "collectives": collectives, "step": step},
        "mfu": wanted / step / chip.flops,
        "peak_flops_per_device": chip.flops,
    }


def model_flops(experiment: Experiment, job: str) -> float:
    """FLOPs that the equations of one step ask for, over all devices: nothing is computed again to save memory."""
    config = experiment.config
    recursion = dataclasses.replace(config.model.recursion, remat="none")
    model = dataclasses.replace(config.model, remat="none", attention="xla", recursion=recursion)
    train = dataclasses.replace(config.train, accumulate=1)
    plain = build(dataclasses.replace(config, model=model, train=train), experiment.mesh.devices.ravel())
    if job == "train":
        return forward_flops(make_train_step(plain), plain.abstract_state, plain.abstract_batch(train.batch_size))
    batch = plain.abstract_batch(config.sample.batch_size)
    indices = jax.ShapeDtypeStruct((config.sample.batch_size,), jnp.int32)
    return forward_flops(drawer(plain), plain.abstract_state.parameters, plain.condition_of(batch), indices)


def advice(experiment: Experiment, topology: Topology, memory: dict, job: str) -> list[dict]:
    """Flags that would make it smaller, most useful first: those that cost little before those that change the run."""
    config, mesh = experiment.config, experiment.mesh.shape
    state = sum(size for name, size in memory.items() if name.startswith("state_") and size)
    room = COMFORT * memory["capacity"] - state
    found = []

    def advise(flag: str, why: str) -> None:
        found.append({"flag": flag, "why": why})

    copies = mesh["data"] // topology.slices
    if copies > 1 and config.mesh.fsdp != -1:
        advise(
            "--config.mesh.data=-1 --config.mesh.fsdp=-1",
            f"each device holds {state:.3g} GiB of state, of which more shards would leave it less",
        )
    if job == "sample":
        per_device = config.sample.batch_size // batch_shards(experiment.mesh)
        if per_device > 1:
            advise(f"--config.sample.batch_size={config.sample.batch_size // per_device}", "one image to a device")
        return found
    per_device = config.train.batch_size // batch_shards(experiment.mesh)
    if config.model.attention == "xla":
        advise("--config.model.attention=fused", "attention that does not write its logits to memory, where it fits")
    if config.model.remat != "full":
        advise("--config.model.remat=full", "keeps the inputs of each block alone; a third more arithmetic")
    if config.train.trainable != "all" and config.train.frozen_dtype == "float32":
        advise("--config.train.frozen_dtype=bfloat16", "halves the parameters that are not trained")
    parts = config.train.accumulate
    group = config.model.recursion.routing_group if config.model.recursion.blocks != "none" else 1
    halves = [
        n
        for n in (2 * parts, 4 * parts, per_device)
        if n > parts and per_device % n == 0 and per_device // n % group == 0
    ]
    for more in sorted(set(halves)):
        advise(f"--config.train.accumulate={more}", f"{per_device // more} images on a device at a time")
    if room <= 0 and len(config.optim.ema_decays):
        advise("--config.optim.ema_decays=0.9999", "one moving average, or none, of the parameters")
    if room <= 0 or not found:
        advise("--topology", "more chips: the state alone, or one image, is too large for these")
    if per_device > 1:
        advise(f"--config.train.batch_size={config.train.batch_size // 2}", "changes the run, unlike all of the above")
    return found


def main() -> None:
    """Answers one request on standard input; see `compile_ahead`."""
    request = json.load(sys.stdin)
    try:
        config = resolve(ml_collections.ConfigDict(request["config"]))
        report = report_on(config, parse_topology(request["topology"], request["slices"]), request["job"])
    except UserError as error:
        report = {"error": str(error)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
