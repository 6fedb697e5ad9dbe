"""How fast does one process read prepared latents, and does training wait for data?

    python -m benchmarks.loader [--save docs/results/benchmark_loader.json]

Random moments of 32x32x4 latents are written as `--mode=prepare` writes them. They are read as in training: in random
order, sampled from their posteriors, in batches of 256. The process is pinned to one core if the system allows it. The
files have just been written and are read from memory, so this measures the code, not a disk. Target: at least 3,000
images a second.

Then the demo trains (configs/digits.py, without sample grids and evaluation) on all cores. The figure is the share of
time that the loop waited for a batch, from metrics.jsonl, without the first line, which includes compilation. Target:
less than 5%.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from etils import epath

from benchmarks.measure import report, rounded
from configs import digits
from trm_diffusion.config import resolve
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.latents import LatentSource, ShardWriter, assemble_manifest, read_shard_record
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sharded import consecutive_ranges
from trm_diffusion.data.shards import write_manifest
from trm_diffusion.jobs.train import train
from trm_diffusion.models.vae import SD
from trm_diffusion.runtime.signals import StopRequest

RECORDS, BATCH_SIZE, BATCHES, ROUNDS = 20_000, 256, 20, 5
LEAST_IMAGES_PER_SECOND, MOST_DATA_WAIT_SHARE = 3_000, 0.05
UPDATES = 300  # of the demo


def write_latents(directory: pathlib.Path) -> None:
    spec = SD.latent_spec("random", 256)
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((64, 2, spec.size, spec.size, spec.channels), np.float32)
    shards = consecutive_ranges(RECORDS, 5_000)
    for number, indices in enumerate(shards):
        with ShardWriter(directory, number, spec, num_classes=1000) as writer:
            for index in indices:
                mean, deviation = moments[index % len(moments)]
                writer.write(mean, np.abs(deviation), index % 1000)
    write_manifest(directory, assemble_manifest([read_shard_record(directory, i) for i in range(len(shards))]))


def read_latents() -> list[float]:
    """Images per second in each round."""
    with tempfile.TemporaryDirectory() as directory:
        write_latents(pathlib.Path(directory))
        iterator = make_iterator(LatentSource(directory), DataConfig(source="latents"), seed=0, batch_size=BATCH_SIZE)
        next(iterator)
        speeds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(BATCHES):
                next(iterator)
            speeds.append(BATCH_SIZE * BATCHES / (time.perf_counter() - start))
        iterator.close()
    return speeds


def demo_data_wait_share(updates: int, every: int) -> float:
    c = digits.get_config()
    c.train.updates = updates
    c.log.update(every=every, samples_every=0, tensorboard=False)
    with tempfile.TemporaryDirectory() as directory, StopRequest() as stop:
        workdir = epath.Path(directory)
        train(resolve(c), workdir, stop)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = sum(line["seconds"] for line in lines)
    return sum(line["data_wait_share"] * line["seconds"] for line in lines) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    speeds = read_latents()
    if cores:
        os.sched_setaffinity(0, cores)
    share = demo_data_wait_share(UPDATES, every=50)
    result = {
        "setting": f"{RECORDS} records of 32x32x4, batches of {BATCH_SIZE}, {ROUNDS} rounds of {BATCHES} batches; "
        f"then {UPDATES} updates of configs/digits.py",
        "cores": 1 if cores else os.cpu_count(),
        "images_per_second": statistics.median(speeds),
        "images_per_second_of_each_round": speeds,
        "demo_data_wait_share": share,
        "pass": statistics.median(speeds) >= LEAST_IMAGES_PER_SECOND and share < MOST_DATA_WAIT_SHARE,
    }
    report("loader", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
