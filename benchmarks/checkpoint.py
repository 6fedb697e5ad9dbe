"""How long does saving a checkpoint block training, and what do checksums add to a restore?

At DiT-B size on a local disk, at most a tenth of a step, and a tenth of a restore.

    python -m benchmarks.checkpoint [--directory DIR] [--save docs/results/benchmark_checkpoint.json]

It uses the training job's own step and checkpoints: DiT-B/2 in float32, parameters, both moments and one EMA (2 GB), 8
images a step, on the devices that JAX finds. The reference is a step while nothing is written. The figures:

blocked   the time until `save` returns and the next step can be dispatched; the target is for this one. The previous
          save has been written by then, as in training, where saves are further apart than they take.
slowed    how much longer the steps take while the save is written in the background. If the CPU itself trains, as here,
          the two share its cores; with an accelerator they do not. It includes the checksums.
restore   seconds with and without verification, in turns; the files are in the page cache, so that reading them hides
          nothing. Both times grow with the bytes: DiT-XL/2 has 10.8 GB.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.measure import median_ratio, progress, report, rounded
from benchmarks.recursion import experiment
from trm_diffusion.conditions import make_condition
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.runtime.checkpoints import CheckpointConfig, Checkpoints
from trm_diffusion.runtime.checksums import NAME
from trm_diffusion.runtime.parameters import memory

MOST_BLOCKED_SHARE = 0.10
MOST_CHECKSUMS_SHARE = 0.10  # of a restore


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Problem sizes; the tests use smaller ones."""

    model: str = "B/2"
    depth: int = 12
    images: int = 8
    steps: int = 3  # timed while nothing is written
    saves: int = 3
    restores: int = 5  # of each kind


def measure(directory: str, sizes: Sizes) -> dict:
    built = experiment(sizes.model, "none", 1, sizes.images, dtype="float32", depth=sizes.depth)
    data = dataclasses.replace(built.config.data, source="synthetic", synthetic_records=64)
    config = dataclasses.replace(built.config, data=data)
    iterator = make_iterator(make_condition(config).source(), data, seed=0, batch_size=sizes.images)
    batch = {name: value for name, value in next(iterator).items() if name != "index"}
    step, state = make_train_step(built), built.init_state()

    def timed_steps(enough) -> list[float]:
        """Seconds of each step until `enough(seconds)`, at least one step."""
        nonlocal state
        seconds = []
        while not seconds or not enough(seconds):
            started = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
        return seconds

    blocked, slowed = [], []
    with Checkpoints(directory, CheckpointConfig(keep=1)) as checkpoints:
        timed_steps(lambda seconds: True)  # compiles
        alone = statistics.median(timed_steps(lambda seconds: len(seconds) == sizes.steps))
        progress(f"a step: {alone:.2f} s")
        for _ in range(sizes.saves):
            update, started = int(state.step), time.perf_counter()
            checkpoints.save(update, state, iterator, {"updates": 0})
            blocked.append(time.perf_counter() - started)
            beside = timed_steps(lambda seconds, saved=Path(directory) / str(update) / NAME: saved.exists())
            slowed.append(sum(beside) - len(beside) * alone)
            progress(f"blocked {blocked[-1]:.3f} s, then {len(beside)} steps slowed by {slowed[-1]:.2f} s")
    share = statistics.median(blocked) / alone
    gigabytes = memory(state) / 1e9
    state = None  # a restored one takes its place
    gc.collect()
    restored = restore_seconds(directory, built.abstract_state, sizes.restores)
    checksums = median_ratio(restored["verified"], restored["unverified"]) - 1
    return {
        "device": jax.devices()[0].device_kind,
        "setting": f"DiT-{sizes.model}, {sizes.depth} blocks, float32, {sizes.images} images a step",
        "state_gigabytes": gigabytes,
        "step_seconds": alone,
        "blocked_seconds": statistics.median(blocked),
        "blocked_seconds_of_each_save": blocked,
        "slowed_seconds": statistics.median(slowed),
        "blocked_over_step": share,
        "restore_seconds": {name: statistics.median(seconds) for name, seconds in restored.items()},
        "restore_seconds_of_each": restored,
        "checksums_over_restore": checksums,
        "pass": share <= MOST_BLOCKED_SHARE and checksums <= MOST_CHECKSUMS_SHARE,
    }


def restore_seconds(directory: str, abstract_state, times: int) -> dict[str, list[float]]:
    """Seconds of each restore of the only checkpoint, verified and unverified in turns, after one that counts not."""
    seconds = {"verified": [], "unverified": []}
    for turn in range(times + 1):
        for name, found in seconds.items():
            with Checkpoints(directory, CheckpointConfig(keep=1, verify=name == "verified")) as checkpoints:
                started = time.perf_counter()
                restored = checkpoints.restore(checkpoints.latest_step(), abstract_state)
                jax.block_until_ready(restored)
                if turn:
                    found.append(time.perf_counter() - started)
                del restored
        progress(f"restores: {seconds}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", help="where to write the checkpoints; the system's temporary directory by default"
    )
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        result = measure(directory, Sizes())
    report("checkpoint", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
