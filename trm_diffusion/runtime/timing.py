"""Wall clock of programs that are compared on a machine that may be busy with other work."""

import random
import time
from collections.abc import Callable

import jax


def interleaved_seconds(programs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, by program.

    Every round runs each program once, so that all see the same machine, in an order drawn anew from a fixed seed, so
    that none always follows the same other one, which leaves it a cold cache or memory to give back.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    seconds, order, rng = {name: [] for name in programs}, list(programs), random.Random(0)
    for _ in range(repeats):
        rng.shuffle(order)
        for name in order:
            started = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - started)
    return seconds
