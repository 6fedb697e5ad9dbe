"""How fast one process reads prepared latents: 3,000 images a second or more on one core?

    python -m benchmarks.loader [--save docs/results/benchmark_loader.json]

Random moments of 32x32x4 latents are written as `--mode=prepare` writes them and read as training reads them, in random
order and drawn from their posteriors, in batches of 256. The process is bound to one core where the system can do so.
The files have just been written, so they are read from memory: the figure is that of the code, not of a disk.
"""

import argparse
import os
import statistics
import tempfile
import time

import numpy as np

from benchmarks.measure import report, rounded
from trm_diffusion.data.latents import LatentSource, LatentWriter
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sources import DataConfig
from trm_diffusion.models.vae import SD

RECORDS, BATCH_SIZE, BATCHES, ROUNDS = 20_000, 256, 20, 5
LEAST_IMAGES_PER_SECOND = 3_000


def write_latents(directory: str) -> None:
    spec = SD.latent_spec("random", 256)
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((64, 2, spec.size, spec.size, spec.channels), np.float32)
    with LatentWriter(directory, spec, num_classes=1000, records_per_shard=5_000) as writer:
        for index in range(RECORDS):
            mean, deviation = moments[index % len(moments)]
            writer.write(mean, np.abs(deviation), index % 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    bound = hasattr(os, "sched_setaffinity")
    if bound:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as directory:
        write_latents(directory)
        iterator = make_iterator(LatentSource(directory), DataConfig(source="latents"), seed=0, batch_size=BATCH_SIZE)
        next(iterator)
        speeds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(BATCHES):
                next(iterator)
            speeds.append(BATCH_SIZE * BATCHES / (time.perf_counter() - start))
        iterator.close()
    result = {
        "setting": f"{RECORDS} records of 32x32x4, batches of {BATCH_SIZE}, {ROUNDS} rounds of {BATCHES} batches",
        "cores": 1 if bound else os.cpu_count(),
        "images_per_second": statistics.median(speeds),
        "images_per_second_of_each_round": speeds,
    }
    result["pass"] = result["images_per_second"] >= LEAST_IMAGES_PER_SECOND
    report("loader", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
