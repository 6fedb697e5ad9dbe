"""Wall-clock times of programs that are compared on a machine that may be busy with other work."""

import random
import time
from collections.abc import Callable

import jax


def interleaved_seconds(programs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, by program.

    Every round runs each program once, so that all see the same machine load. The order is shuffled for each round,
    with a fixed seed: otherwise one program could always inherit a cold cache, or memory to free, from the same other.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    seconds = {name: [] for name in programs}
    order = list(programs)
    rng = random.Random(0)
    for _ in range(repeats):
        rng.shuffle(order)
        for name in order:
            started = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - started)
    return seconds
