"""Does a training step cost each chip the same on 8 and on 1,024 TPU v5p chips? By the compiler; nothing is run.

DiT-XL/2 without recursion, its blocks in one loop, 16 images per chip, fsdp 8 and data-parallel copies over the rest.

Each of the n devices of a copy holds 1/n of the P bytes of parameters (in bfloat16, the compute dtype). Parameters are
all-gathered before the forward and before the backward pass, and gradients are reduce-scattered: a device sends
3 P (n - 1) / n bytes. The d copies then all-reduce their shards, at most in float32: 2 (2 P / n) (d - 1) / d, less than
4 P / n for any number of chips. So the bytes that a device sends are bounded.

Targets: memory and FLOPs per device are constant within 5%; a device sends at most 1.05 times the bytes on 8 chips plus
those that the copies add.

    python -m benchmarks.weak_scaling [--chips 8,64,256,1024] [--save docs/results/benchmark_weak_scaling.json]
"""

import argparse

from benchmarks.measure import progress, report, rounded
from configs import imagenet256
from trm_diffusion.conditions import make_condition
from trm_diffusion.config import Config, resolve
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.experiment import make_model
from trm_diffusion.jobs.compile_ahead import compiler_report
from trm_diffusion.runtime.parameters import count

TOPOLOGIES = {8: "2x2x2", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}
IMAGES_PER_CHIP, FSDP = 16, 8
MOST_CHANGE, MOST_OVER_ALGEBRA = 0.05, 1.05


def config_of(chips: int) -> Config:
    c = imagenet256.get_config("model=XL/2,recursion=off")
    c.train.batch_size = c.sample.batch_size = IMAGES_PER_CHIP * chips
    c.mesh.fsdp = FSDP
    return resolve(c)


def added_by_copies(parameters: int, chips: int) -> float:
    """Bytes that a device sends to all-reduce gradients with the other copies, in float32."""
    copies = chips // FSDP
    return 2 * 4 * parameters / FSDP * (copies - 1) / copies


def row(chips: int) -> dict:
    found = compiler_report(config_of(chips), f"v5p:{TOPOLOGIES[chips]}", 1, "train", install=False)
    collectives = found["collectives_per_device"]
    result = {
        "memory_gib": found["memory_gib_per_device"]["total"],
        "flops": found["flops_per_device"],
        "sent_bytes": sum(part["bytes"] for part in collectives.values()),
        "sent_bytes_by_kind": {kind: part["bytes"] for kind, part in collectives.items()},
        "predicted_step_seconds": found["seconds"]["step"],
        "compile_seconds": found["compile_seconds"],
    }
    progress(f"{chips} chips: {result}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="8,64,256,1024", help=f"some of {', '.join(map(str, TOPOLOGIES))}")
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    config = config_of(FSDP)
    parameters = count(make_model(config, make_objective(config.diffusion), make_condition(config)).shapes)
    rows = {chips: row(chips) for chips in map(int, arguments.chips.split(","))}
    least = rows[min(rows)]
    for chips, entry in rows.items():
        allowed = least["sent_bytes"] + added_by_copies(parameters, chips)
        entry["sent_over_algebra_ratio"] = entry["sent_bytes"] / allowed
        entry["memory_ratio"] = entry["memory_gib"] / least["memory_gib"]
        entry["flops_ratio"] = entry["flops"] / least["flops"]
        entry["pass"] = (
            max(abs(entry["memory_ratio"] - 1), abs(entry["flops_ratio"] - 1)) <= MOST_CHANGE
            and entry["sent_over_algebra_ratio"] <= MOST_OVER_ALGEBRA
        )
    result = {
        "setting": f"DiT-XL/2, {parameters} parameters, {IMAGES_PER_CHIP} images a chip, v5p, fsdp {FSDP}",
        "fsdp_algebra_bytes": 3 * 2 * parameters * (FSDP - 1) / FSDP,
        "by_chips": {str(chips): entry for chips, entry in rows.items()},
        "pass": all(entry["pass"] for entry in rows.values()),
    }
    report("weak_scaling", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
