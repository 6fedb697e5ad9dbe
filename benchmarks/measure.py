"""Shared by the benchmarks: interleaved timing, the TPU compiler in a child process, and reporting of results."""

import json
import os
import platform
import statistics
import sys
from pathlib import Path

import jax

from trm_diffusion.errors import UserError
from trm_diffusion.runtime.libtpu import run_with_libtpu
from trm_diffusion.runtime.timing import interleaved_seconds as interleaved_seconds
from trm_diffusion.runtime.topology import described_devices, parse_topology

TPU_TOPOLOGY = "v5p:2x2x1"  # the smallest; programs are compiled for its first chip


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over rounds of one program's time divided by the reference's."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def tpu_device() -> jax.Device:
    """A described v5p chip to compile for; no hardware needed. Needs libtpu."""
    return described_devices(parse_topology(TPU_TOPOLOGY))[0]


def measured_for_tpu(module: str, *arguments: str) -> dict:
    """The report of `python -m module --tpu arguments`, run with libtpu; {"not_measured": why} without libtpu."""
    try:
        return run_with_libtpu(["-m", module, "--tpu", *arguments])
    except UserError as error:
        return {"not_measured": str(error)}


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(benchmark: str, result: dict, save: str) -> None:
    """Prints the result, with machine and command, as one line of JSON; also writes it to the file `save` unless ""."""
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
    """`value`, nested dicts and lists, with floats rounded to this many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
