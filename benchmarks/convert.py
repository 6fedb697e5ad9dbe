"""Does a full-size DiT-XL/2 convert in under 2 minutes and 8 GiB?

    python -m benchmarks.convert

It writes random weights in the published layout, 2.7 GB, to a temporary directory, converts them with the command, and
converts them back, which must give the same tensors. Memory is the command's peak resident set size, which includes the
mapped pages of the files it reads.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trm_diffusion.models.dit import dit_size
from trm_diffusion.weights.convert import LAYOUTS, Weights, to_theirs
from trm_diffusion.weights.safetensors import TensorSpec, read_safetensors, write_safetensors

XL_2 = dit_size("XL/2") | dict(mlp_ratio=4.0, image_size=32, in_channels=4, out_channels=8, num_classes=1000)
SECONDS, GIB = 120, 8


def write_published(path: Path) -> int:
    """Writes random float32 weights; returns the number of parameters."""
    rng, float32 = np.random.default_rng(0), np.dtype(np.float32)
    specs = {name: TensorSpec(shape, float32) for name, shape in LAYOUTS["dit"].shapes(XL_2).items()}
    weights = Weights("dit", XL_2, specs, lambda name: rng.standard_normal(specs[name].shape, np.float32), {})
    write_safetensors(path, *to_theirs(weights, "dit", "random"))
    return weights.parameters


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        published, ours, again = (Path(directory) / name for name in ("dit.safetensors", "ours", "again"))
        parameters = write_published(published)
        seconds = []
        for source, destination, options in ((published, ours, []), (ours, again, ["--to-layout=dit"])):
            start = time.perf_counter()
            flags = ["--mode=convert", f"--from={source}", f"--to={destination}", *options]
            subprocess.run([sys.executable, "-m", "trm_diffusion.main", *flags], check=True)
            seconds.append(round(time.perf_counter() - start, 1))
        before, after = read_safetensors(published), read_safetensors(again / "model.safetensors")
        same = before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report = {"parameters": parameters, "in_seconds": seconds[0], "out_seconds": seconds[1], "peak_gib": round(gib, 2)}
    report["pass"] = same and max(seconds) < SECONDS and gib < GIB
    print(json.dumps(report))
    return 0 if report["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
