"""What the benchmarks share: interleaved timing, the TPU compiler in a child process, and how results are given out."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import jax

from trm_diffusion.runtime.timing import interleaved_seconds as interleaved_seconds

TPU_TOPOLOGY = "v5p:2x2x1"  # the smallest; programs are compiled for its first chip
LIBTPU = "TRM_LIBTPU"  # environment variable: a directory into which libtpu was installed with pip --target


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """The median over rounds of one program's time over the other's."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def tpu_device() -> jax.Device:
    """A v5p chip to compile for, which is described, not there. Needs libtpu."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(TPU_TOPOLOGY, platform="tpu").devices[0]


def measured_for_tpu(module: str, *arguments: str) -> dict:
    """What `python -m module --tpu arguments` reports, where libtpu can be imported; {"not_measured": why} elsewhere.

    A process of its own, because libtpu is noisy and takes over the process that loads it.
    """
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    directory = os.environ.get(LIBTPU, "")
    if directory:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [directory, os.environ.get("PYTHONPATH", "")]))
        if not (Path(directory) / "libtpu").is_dir():
            return {"not_measured": f"{LIBTPU} holds no libtpu"}
    elif importlib.util.find_spec("libtpu") is None:
        return {"not_measured": f"no libtpu; see requirements-tpu-compile.txt and set {LIBTPU}"}
    child = subprocess.run(
        [sys.executable, "-m", module, "--tpu", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"{module} --tpu failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(benchmark: str, result: dict, save: str) -> None:
    """Prints the result with the machine and the command as one line of JSON; writes it to the file `save`, if any."""
    result = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark}",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, jax {jax.__version__}",
        **result,
    }
    if save:
        Path(save).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def rounded(value, digits: int = 4):
    """Floats in a nest of dictionaries and lists, to so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
