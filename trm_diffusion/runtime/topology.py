"""TPU topologies to compile for without the hardware: names such as v5p:4x4x4, and properties of their chips."""

import dataclasses
import math
import re

import jax

from trm_diffusion.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation. Figures are per JAX device; speeds are the published peaks (cloud.google.com/tpu/docs)."""

    example: str  # name of a topology
    axes: int  # dimensions of its network: 2 or 3
    most_chips: int  # in a slice
    memory_bytes: float  # usable by a program; v4 and v5e: limit of the compiler, others not yet tried
    flops: float  # bfloat16 operations per second
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second sent within its slice, over all links
    slice_bandwidth: float  # bytes per second sent to other slices
    cycles: float  # per second
    devices: int = 1  # JAX devices per chip
    options: tuple[tuple[str, str], ...] = ()  # compiler options that match how the chip is used in practice


CHIPS = {
    "v4": Chip(
        "v4:2x2x4", 3, 4096, 30.75 * GIB, 275e12, 1228e9, 300e9, 6.25e9, 1.05e9, 1, (("chip_config_name", "megacore"),)
    ),
    "v5e": Chip("v5e:4x4", 2, 256, 15.75 * GIB, 197e12, 819e9, 200e9, 3.125e9, 1.5e9),
    "v5p": Chip("v5p:4x4x4", 3, 8960, 95.74 * GIB, 459e12, 2765e9, 600e9, 6.25e9, 1.75e9),
    "v6e": Chip("v6e:8x8", 2, 256, 31.25 * GIB, 918e12, 1638e9, 400e9, 12.5e9, 1.75e9),
    "tpu7x": Chip("tpu7x:2x2x1", 3, 9216, 94.75 * GIB, 1153.5e12, 3690e9, 300e9, 6.25e9, 2.2e9, 2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of the same shape."""

    name: str
    generation: str
    shape: tuple[int, ...]  # chips along each axis of a slice
    slices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Total over all slices."""
        return self.slices * math.prod(self.shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parses and checks the name without the compiler. Raises UserError, in one line, with the known topologies."""
    known = ", ".join(chip.example for chip in CHIPS.values())
    if not name:
        raise UserError(f"--mode=compile needs --topology: one of {known}, or another size of these")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        raise UserError(f"--topology={name}: no such TPU; choose one of {known}, or another size of these")
    chip = CHIPS[found[1]]
    shape = tuple(map(int, found[2].split("x")))
    if len(shape) != chip.axes:
        raise UserError(f"--topology={name}: {found[1]} has {chip.axes} axes, as in {chip.example}")
    if 0 in shape or any(size > 1 and size % 2 for size in shape[:2]):
        raise UserError(f"--topology={name}: a host has 2x2 chips, so the first two numbers must be 1 or even")
    if math.prod(shape) > chip.most_chips:
        raise UserError(f"--topology={name}: a slice of {found[1]} has at most {chip.most_chips} chips; try --slices")
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1")
    return Topology(name, found[1], shape, slices)


def described_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, to compile for. Needs libtpu. Raises UserError if the compiler does not know it."""
    from jax.experimental import topologies

    options = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    hosts = (*(min(2, size) for size in topology.shape[:2]), 1)
    try:
        described = topologies.get_topology_desc(topology.name, "tpu", chips_per_host_bounds=hosts, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from None
    return described.devices
