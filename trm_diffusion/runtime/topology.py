"""TPU pods that programs are compiled for without being there: names such as v5p:4x4x4, what their chips can do."""

import dataclasses
import math
import re

import jax

from trm_diffusion.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Per device as JAX counts them; speeds are the published peaks (cloud.google.com/tpu/docs)."""

    example: str  # a topology of it
    axes: int  # of its network: 2 or 3
    most_chips: int  # in a slice
    memory_bytes: float  # that a program may use: v4 and v5e as the compiler refuses more, the others not yet tried
    flops: float  # bfloat16 operations a second
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that leave it for others of its slice, over all links
    slice_bandwidth: float  # bytes a second that leave it for other slices
    cycles: float  # a second
    devices: int = 1  # that JAX sees on a chip
    options: tuple[tuple[str, str], ...] = ()  # for the compiler: how the chip is used in practice


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
    """So many slices of one shape."""

    name: str
    generation: str
    shape: tuple[int, ...]  # chips along each axis of a slice
    slices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """In all slices together."""
        return self.slices * math.prod(self.shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Checks the name without asking the compiler. Raises UserError with one line that says what there is."""
    known = ", ".join(chip.example for chip in CHIPS.values())
    if not name:
        raise UserError(f"--mode=compile needs --topology: one of {known}, or other sizes of each")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        raise UserError(f"--topology={name}: no such TPU; there are {known}, and other sizes of each")
    chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(shape) != chip.axes:
        raise UserError(f"--topology={name}: {found[1]} has {chip.axes} axes, as in {chip.example}")
    if 0 in shape or any(size > 1 and size % 2 for size in shape[:2]):
        raise UserError(f"--topology={name}: hosts hold 2x2 chips, so the first two numbers are 1 or even")
    if math.prod(shape) > chip.most_chips:
        raise UserError(f"--topology={name}: a slice of {found[1]} has at most {chip.most_chips} chips; try --slices")
    if slices < 1:
        raise UserError(f"--slices={slices}: it must be at least 1")
    return Topology(name, found[1], shape, slices)


def described_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, to compile for. Needs libtpu. Raises UserError where the compiler knows none such."""
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
