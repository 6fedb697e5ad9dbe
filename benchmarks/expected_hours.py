"""How many hours do training on ImageNet and its 50,000 samples take? Predicted for a TPU pod and for eight GPUs.

DiT-XL/2 at 256x256 with the config's own settings: 400,000 updates of 256 images; 50,000 images in 250 diffusion steps
with guidance, batches of 512, without the autoencoder.

    TPU v5p, 32 chips    (sold as v5p-64, which counts cores): the compiler's cycles, and bytes over the links, as
                         --mode=compile adds them up. Loading, logging and checkpoints are not in it
    8 x H100             the FLOPs that the equations ask for, at the share of the peak (989 TFLOP/s) that is stated: an
                         assumption, not a measurement

It passes where the compiler predicts a share of the peak between 0 and 1 for each.

    python -m benchmarks.expected_hours [--save docs/results/expected_hours.json]
"""

import argparse
import math

from benchmarks.measure import progress, report, rounded
from configs import imagenet256
from trm_diffusion.compile_ahead import compiler_report
from trm_diffusion.config import resolve

TOPOLOGY, SAMPLES, SAMPLES_AT_A_TIME = "v5p:2x4x4", 50_000, 512
GPUS, GPU_FLOPS, GPU_MFU = 8, 989e12, 0.35


def hours(recursion: str, job: str) -> dict:
    c = imagenet256.get_config(f"recursion={recursion}")
    c.sample.batch_size, c.sample.guidance_channels = SAMPLES_AT_A_TIME, "dit3"
    config = resolve(c)
    found = compiler_report(config, TOPOLOGY, 1, job, install=False)
    steps = config.train.updates if job == "train" else math.ceil(SAMPLES / SAMPLES_AT_A_TIME)
    flops = steps * found["model_flops_per_device"] * found["devices"]
    result = {
        "v5p_32_chips_hours": steps * found["seconds"]["step"] / 3600,
        "8_h100_hours": flops / (GPUS * GPU_FLOPS * GPU_MFU) / 3600,
        "seconds_of_one": found["seconds"],
        "v5p_predicted_mfu": found["mfu"],
        "model_flops": flops,
    }
    progress(f"recursion {recursion}, {job}: {result}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    asked = [(recursion, job) for job in ("train", "sample") for recursion in ("off", "middle")]
    rows = {f"{job}_{recursion}": hours(recursion, job) for recursion, job in asked}
    print(f"{'':16} {'v5p, 32 chips':>14} {'8 x H100':>10}   hours")
    for name, row in rows.items():
        print(f"{name:16} {row['v5p_32_chips_hours']:14.1f} {row['8_h100_hours']:10.1f}")
    result = {"topology": TOPOLOGY, "gpu_assumed_mfu": GPU_MFU, "by_job": rows}
    result["pass"] = all(0 < row["v5p_predicted_mfu"] < 1 for row in rows.values())
    report("expected_hours", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
