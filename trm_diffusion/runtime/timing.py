"""Wall clock of programs that are compared on a machine that may be busy with other work."""

import time
from collections.abc import Callable

import jax


def interleaved_seconds(programs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, by program; every round runs each program once, so that all see the same machine."""
    for program in programs.values():
        jax.block_until_ready(program())
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - started)
    return seconds
