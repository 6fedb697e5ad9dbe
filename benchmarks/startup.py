"""How long until the first update (import, build, compile), with an empty and with a filled compilation cache?

    python -m benchmarks.startup [--save docs/results/benchmark_startup.json]

It starts DiT-S/2 with recursion in its middle block, float32, 8 images, as `main` would: one process with an empty
compilation cache, the reference, then several that use its cache. Targets: with the cache, nothing is recompiled that
takes longer than the cache's threshold (runtime/devices.py), and the first update takes at most half the time.
"""

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import progress, report, rounded

CONFIG = "model=S/2,recursion=middle"
MOST_WARM_SHARE = 0.5


def child(cache: str, depth: int) -> dict:
    """Timings of one start, without that of the interpreter."""
    started = time.perf_counter()
    import jax
    import numpy as np
    from etils import epath

    from configs.imagenet256 import get_config
    from trm_diffusion.config import resolve
    from trm_diffusion.experiment import build
    from trm_diffusion.jobs.train_step import make_train_step
    from trm_diffusion.runtime.devices import use_compilation_cache

    seconds = {"import": time.perf_counter() - started}
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
    use_compilation_cache(cache, epath.Path("unused/run"))

    def since(name: str) -> None:
        seconds[name] = time.perf_counter() - started - sum(seconds.values())

    c = get_config(CONFIG)
    c.train.batch_size, c.model.dtype, c.model.depth, c.model.recursion.routing_group = 8, "float32", depth, 8
    built = build(resolve(c))
    since("build")
    state, step = jax.block_until_ready(built.init_state()), make_train_step(built)
    since("initial_state")
    size, channels = c.data.image_size, c.data.channels
    batch = {"image": np.zeros((8, size, size, channels), np.float32), "label": np.arange(8, dtype=np.int32)}
    state, _ = jax.block_until_ready(step(state, batch))
    since("first_update")
    jax.block_until_ready(step(state, batch))
    since("second_update")
    return {"seconds": seconds, "cache_hits": events["cache_hits"], "cache_misses": events["cache_misses"]}


def measure(turns: int, depth: int) -> dict:
    def start(cache: str) -> dict:
        command = [sys.executable, "-m", "benchmarks.startup", "--child", cache, "--depth", str(depth)]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        progress(str(found))
        return found

    with tempfile.TemporaryDirectory() as cache:
        cold, warm = start(cache), [start(cache) for _ in range(turns)]
    median = {name: statistics.median(one["seconds"][name] for one in warm) for name in cold["seconds"]}
    share = median["first_update"] / cold["seconds"]["first_update"]
    met = {
        "nothing_is_compiled_anew": all(one["cache_misses"] == 0 < one["cache_hits"] for one in warm),
        f"first_update_takes_at_most_{MOST_WARM_SHARE}": share <= MOST_WARM_SHARE,
    }
    return {
        "setting": f"configs/imagenet256.py:{CONFIG}, {depth} blocks, float32, 8 images; medians of {turns} starts",
        "seconds_with_an_empty_cache": {**cold["seconds"], "total": sum(cold["seconds"].values())},
        "seconds_with_the_cache": {**median, "total": sum(median.values())},
        "first_update_over_that_with_an_empty_cache": share,
        "met": met,
        "pass": all(met.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one start with this cache directory
    parser.add_argument("--turns", type=int, default=3, help="number of starts with the cache")
    parser.add_argument("--depth", type=int, default=12, help="number of blocks")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.depth)))
        return
    report("startup", rounded(measure(arguments.turns, arguments.depth)), arguments.save)


if __name__ == "__main__":
    main()
