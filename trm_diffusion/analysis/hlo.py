"""The cost of a compiled program on one device, read from its optimised HLO text.

The compiler's own `cost_analysis` counts the body of a loop once, however often it runs, and ignores what devices send
each other. Here every computation is counted as often as it runs:

    FLOPs           2 for each multiply-add of matrix products and convolutions, and what custom kernels declare
    bytes           operands and results of every operation outside fusions; for a slice, only the slice
    cycles          the compiler's estimate, if the text has one (TPU); none for collectives
    collectives     bytes that one device sends, for the algorithms that send least (rings): with s bytes of operands on
                    each of n devices, all-gather s (n - 1), reduce-scatter and all-to-all s (n - 1) / n, all-reduce
                    2 s (n - 1) / n, collective-permute s. A start/done pair counts once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}  # others have the bits in their names
BETWEEN_SLICES = {  # the TPU compiler's names
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_FREE = {  # operations that move no data themselves
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "partition-id"),
    *("replica-id", "after-all", "opt-barrier", "iota", "custom-call-done"),
}


class Array(NamedTuple):
    """The type of a value, or of an element of a tuple."""

    dtype: str
    dimensions: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        item = ITEM_BYTES.get(self.dtype) or (int(bits[0]) / 8 if bits else 0)  # a token has no size
        return item * math.prod(self.dimensions)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    constant: str  # the text in the parentheses of a constant or a parameter

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.results)

    def attribute(self, pattern: str, default: str = "") -> str:
        found = re.search(pattern, self.attributes)
        return found[1] if found else default


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass
class Cost:
    """The cost on one device of running a program, or a part of it, once."""

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    kernel_flops: float = 0.0  # the share of custom kernels, for which the compiler estimates no cycles
    kernel_bytes: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # kind -> count, bytes sent
    unknown_loops: int = 0  # loops of unknown trip count, whose body is counted once

    def add(self, other: "Cost", times: float = 1) -> None:
        for name in ("flops", "bytes", "cycles", "kernel_flops", "kernel_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown_loops += other.unknown_loops
        for kind, part in other.collectives.items():
            mine = self.collectives.setdefault(kind, dict.fromkeys(part, 0))
            for name, value in part.items():
                mine[name] += times * value


def program_cost(text: str, slices: int = 1) -> Cost:
    """The cost of the program on one device.

    slices: groups of devices with slower links between them. The TPU compiler splits a collective over several slices
    into one within each slice and a `send` between slices, which is counted separately, as "KIND between slices".
    """
    return _Counter(*parse(text), slices).cost_of_entry()


def largest_arrays(text: str, count: int) -> list[dict]:
    """The largest arrays that a program creates outside fusions, each type and shape once."""
    computations, _ = parse(text)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text))
    made = {
        array
        for name, computation in computations.items()
        if name not in fused
        for one in computation.instructions.values()
        if one.opcode != "parameter"
        for array in one.results
    }
    largest = sorted(made, key=lambda array: -array.bytes)[:count]
    return [{"array": f"{a.dtype}{list(a.dimensions)}", "gib": round(a.bytes / 2**30, 3)} for a in largest]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the entry computation."""
    computations, entry, name = {}, "", ""
    instructions: dict[str, Instruction] = {}
    root = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, instructions = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(instructions, root)
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3])
            instructions[instruction.name] = instruction
            root = instruction if found[1] else root
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parses "TYPE OPCODE(OPERANDS), ATTRIBUTES"."""
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    return Instruction(
        name,
        text[end:opening].strip(),
        tuple(_arrays(text[:end])),
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        text[closing:],
        inside,
    )


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dimensions in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(size) for size in dimensions.split(",") if size))


class _Counter:
    """Counts the cost of each computation once and caches it."""

    def __init__(self, computations: dict[str, Computation], entry: str, slices: int):
        self._computations, self._entry, self._slices = computations, entry, slices
        self._cost = functools.cache(self._count)

    def cost_of_entry(self) -> Cost:
        return self._cost(self._entry)

    def _count(self, name: str) -> Cost:
        total = Cost()
        for instruction in self._computations[name].instructions.values():
            total.add(self._of(self._computations[name], instruction))
        return total

    def _of(self, where: Computation, one: Instruction) -> Cost:
        opcode = one.opcode
        called = re.findall(
            r"(?:calls|to_apply|body|branch_computations|\w+_computation)=\{?%?([\w.\-]+)", one.attributes
        )
        cost = Cost()
        if opcode == "while":
            turns = self._turns(where, one)
            cost.unknown_loops += turns is None
            for part in (one.attribute(r"body=%?([\w.\-]+)"), one.attribute(r"condition=%?([\w.\-]+)")):
                cost.add(self._cost(part), 1 if turns is None else turns)
        elif opcode == "conditional":  # the most expensive branch
            branches = re.findall(r"%([\w.\-]+)", one.attribute(r"branch_computations=\{(.*?)\}")) or called
            cost.add(max(map(self._cost, branches), key=lambda branch: (branch.flops, branch.bytes)))
        elif opcode in ("call", "async-start"):
            for part in called:
                cost.add(self._cost(part))
        elif opcode.endswith(("-done", "-update")):
            pass
        elif kind := next((kind for kind in COLLECTIVES if opcode in (kind, f"{kind}-start")), None):
            self._collect(cost, kind, where, one, len(first_group(one.attributes)))
        elif between := opcode == "send" and one.attribute(r'_xla_megascale_transfer_type="(\w+)"'):
            self._collect(cost, BETWEEN_SLICES[between], where, one, self._slices, " between slices")
        elif opcode == "fusion":
            inner = self._cost(called[0])
            cost.flops, cost.kernel_flops, cost.kernel_bytes = inner.flops, inner.kernel_flops, inner.kernel_bytes
            cost.collectives = self._fused_collectives(called[0])
            cost.bytes = self._fusion_bytes(where, one, self._computations[called[0]])
        elif kernel := one.attribute(r'"cost_estimate":\{([^}]*)\}'):
            flops, moved = (re.search(rf'"{name}":"?(\d+)', kernel) for name in ("flops", "bytes_accessed"))
            cost.flops = cost.kernel_flops = float(flops[1]) if flops else 0.0
            cost.bytes = cost.kernel_bytes = float(moved[1]) if moved else self._bytes(where, one)
        else:
            cost.flops = self._flops(where, one)
            cost.bytes = self._bytes(where, one)
        cost.cycles += float(one.attribute(r'"estimated_cycles":"(\d+)"', "0"))
        return cost

    def _turns(self, where: Computation, loop: Instruction) -> int | None:
        """A loop's trip count: the compiler's, or from `counter < constant` and its start; None if unknown."""
        known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        compare, start = condition.root, where.instructions.get(loop.operands[0])
        if compare.opcode != "compare" or compare.attribute(r"direction=(\w+)") != "LT":
            return None
        counter, limit = (condition.instructions[name] for name in compare.operands)
        limit = self._constant(limit, start, where)
        first = self._constant(counter, start, where)
        return None if limit is None or first is None else max(0, limit - first)

    def _constant(self, value: Instruction, start: Instruction | None, where: Computation) -> int | None:
        """A known integer: a constant, or an element of the loop's state that starts as one. None if unknown."""
        if value.opcode == "get-tuple-element" and start is not None and start.opcode == "tuple":
            value = where.instructions[start.operands[int(value.attribute(r"index=(\d+)"))]]
        while value.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"):
            value = where.instructions[value.operands[0]]
        digits = re.fullmatch(r"-?\d+", value.constant.strip())
        return int(digits[0]) if value.opcode == "constant" and digits else None

    def _flops(self, where: Computation, one: Instruction) -> float:
        if one.opcode == "dot":
            lhs = where.instructions[one.operands[0]].results[0].dimensions
            contracted = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            return 2 * math.prod(one.results[0].dimensions) * math.prod(lhs[int(i)] for i in contracted.split(",") if i)
        if one.opcode == "convolution":
            return _convolution_flops(*(where.instructions[name].results[0].dimensions for name in one.operands), one)
        return 0.0

    def _bytes(self, where: Computation, one: Instruction) -> float:
        if one.opcode in _FREE or 'custom_call_target="AllocateBuffer"' in one.attributes:
            return 0.0
        if one.opcode == "copy-start":  # its result includes both source and destination
            return one.bytes
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * one.bytes
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * where.instructions[one.operands[1 if one.opcode == "dynamic-update-slice" else -1]].bytes
        return one.bytes + sum(where.instructions[name].bytes for name in one.operands if name in where.instructions)

    def _fusion_bytes(self, where: Computation, one: Instruction, fused: Computation) -> float:
        """Operands and results of a fusion. If one is only sliced or updated in place, only the bytes touched count."""
        total = self._written(fused, fused.root)
        for position, name in enumerate(one.operands):
            if name in where.instructions:
                total += self._read(fused, position, where.instructions[name].bytes)
        return total

    def _read(self, fused: Computation, position: int, full: float) -> float:
        """Bytes that a fusion reads of an operand of `full` bytes."""
        at = (one for one in fused.instructions.values() if one.opcode == "parameter" and one.constant == str(position))
        names, read = [next(at).name], 0.0
        while names:
            name = names.pop()
            for use in fused.instructions.values():
                for place in (place for place, operand in enumerate(use.operands) if operand == name):
                    if use.opcode in ("bitcast", "tuple"):
                        names.append(use.name)
                    elif use.opcode in ("dynamic-slice", "slice") and place == 0:
                        read += use.bytes
                    elif use.opcode == "fusion":
                        read += self._read(self._computations[use.attribute(r"calls=%?([\w.\-]+)")], place, full)
                    elif use.opcode != "dynamic-update-slice" or place:
                        return full
        return min(read, full)

    def _written(self, fused: Computation, one: Instruction) -> float:
        """Bytes that a fusion with this root writes."""
        if one.opcode in ("tuple", "bitcast"):
            return sum(self._written(fused, fused.instructions[name]) for name in one.operands)
        if one.opcode == "dynamic-update-slice":
            return fused.instructions[one.operands[1]].bytes
        if one.opcode == "fusion":
            inner = self._computations[one.attribute(r"calls=%?([\w.\-]+)")]
            return self._written(inner, inner.root)
        return one.bytes

    def _collect(self, cost: Cost, kind: str, where: Computation, one: Instruction, n: int, over: str = "") -> None:
        """Adds the bytes that a device sends in a collective over n devices."""
        size = sum(where.instructions[name].bytes for name in one.operands)
        sent = {
            "all-gather": size * (n - 1),
            "all-reduce": 2 * size * (n - 1) / n,
            "reduce-scatter": size * (n - 1) / n,
            "all-to-all": size * (n - 1) / n,
            "collective-permute": size,
        }[kind]
        cost.add(Cost(collectives={kind + over: {"count": 1, "bytes": sent}}))

    def _fused_collectives(self, name: str) -> dict:
        """The collectives in a fusion. An all-reduce of which each device keeps only its part is a reduce-scatter."""
        fused, cost = self._computations[name], Cost()
        for inner in fused.instructions.values():
            opcode = inner.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                kept = opcode == "all-reduce" and fused.root.bytes < inner.bytes
                self._collect(
                    cost, "reduce-scatter" if kept else opcode, fused, inner, len(first_group(inner.attributes))
                )
        return cost.collectives


def _convolution_flops(lhs: tuple, rhs: tuple, one: Instruction) -> float:
    """FLOPs of a convolution, without products with padding. HLO may write a batched matrix product as one, too."""
    lhs_labels, rhs_labels, _ = re.split(r"_|->", one.attribute(r"dim_labels=([\w?]+->[\w?]+)").replace("->", "_"))
    window = one.attribute(r"window=\{(.*?)\}")

    def field(name: str, default: str) -> list[str]:
        found = re.search(rf"(?<![a-z_]){name}=([\dx_\-]+)", window)
        count = sum(label.isdigit() for label in lhs_labels)
        return found[1].split("x") if found else [default] * count

    positions = 1
    fields = (field(*pair) for pair in (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")))
    for axis, (stride, pad, lhs_dilate, rhs_dilate) in enumerate(zip(*fields, strict=True)):
        size, taps = lhs[lhs_labels.index(str(axis))], rhs[rhs_labels.index(str(axis))]
        low, high = map(int, pad.split("_"))
        stride, lhs_dilate, rhs_dilate = int(stride), int(lhs_dilate), int(rhs_dilate)
        dilated, reach = (size - 1) * lhs_dilate + 1, (taps - 1) * rhs_dilate + 1
        outputs = (dilated + low + high - reach) // stride + 1
        at = np.arange(outputs)[:, None] * stride - low + np.arange(taps)[None] * rhs_dilate
        positions *= int(np.sum((at >= 0) & (at < dilated) & (at % lhs_dilate == 0)))
    batch = lhs[lhs_labels.index("b")] // int(one.attribute(r"batch_group_count=(\d+)", "1"))
    return 2 * positions * batch * rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")]


def first_group(attributes: str) -> list[int]:
    """The devices of the first group of a collective, in any of HLO's notations for groups."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        ends = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)", pairs[0])]
        return list(next((pair for pair in ends if pair[0] != pair[1]), ends[0]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(device) for device in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dimensions, order = iota.groups()
        return _counted(dimensions, order).reshape(_integers(groups))[0].tolist()
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        places = _group_of_mesh(mesh[1], mesh[3])
        if laid := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", mesh[2] or ""):
            return _counted(*laid.groups()).reshape(-1)[places].tolist()
        listed = _integers(mesh[2])
        return [listed[place] for place in places] if listed else places
    if unknown := re.search(r"replica_groups=(?!\{\}).{,60}", attributes):
        raise ValueError(f"device groups in an unknown notation: {unknown[0]}")
    return [0]


def _integers(text: str | None) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text or "")]


def _counted(dimensions: str, order: str | None) -> np.ndarray:
    """Devices 0, 1, 2 ... in an array of these dimensions, transposed to `order` if one is given."""
    sizes = _integers(dimensions)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(_integers(order) or range(len(sizes)))


def _group_of_mesh(axes: str, named: str) -> list[int]:
    """The first group over named axes of a mesh, e.g. "'a'=4,'b'=2" and "'b'", or for part of an axis "'a':(2)2"."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name], stride = stride, stride * sizes[name]
    group = np.zeros(1, int)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named):
        size, before = int(size or sizes[name]), int(before or 1)
        step = strides[name] * sizes[name] // (before * size)
        group = (group[:, None] + step * np.arange(size)).reshape(-1)
    return group.tolist()
