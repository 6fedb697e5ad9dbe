"""The safetensors format, read as memory maps and written tensor by tensor, so that no file needs to fit in memory.

A file holds the length of its header (uint64, little-endian); the header, which is JSON from name to dtype, shape and
byte range; and the tensors' bytes, little-endian, row-major, without gaps.
"""

import json
import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.readers.opening import open_file, size_of
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import check, parse
from trm_diffusion.readers.text import decode

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
ENTRY = {"dtype": str, "shape": [int], "data_offsets": (int, int)}  # form of a tensor in the header


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors by name, memory-mapped and read when used. Raises UserError if the file is truncated or damaged."""
    path = local_path(path)
    with open_file(path) as file:
        size = size_of(file)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > min(size - LENGTH_BYTES, MOST_HEADER_BYTES):
            raise UserError(f"{path} is not a safetensors file, or is truncated in its header; fetch it again")
        where = f"{path} is not a safetensors file, or its header is damaged"
        entries = parse(decode(file.read(length), where), dict, where)
    entries.pop("__metadata__", None)
    first = LENGTH_BYTES + length
    places = _places(entries, path, where, size - first)
    data = np.memmap(path, np.uint8, mode="r")[first:] if places else None
    return {name: data[start:end].view(spec.dtype).reshape(spec.shape) for name, (spec, start, end) in places.items()}


def _places(entries: dict, path: os.PathLike, where: str, size: int) -> dict[str, tuple[TensorSpec, int, int]]:
    """Spec, first and last byte of each tensor of a header. Raises UserError unless they fill `size` bytes."""
    check(entries, {str: ENTRY}, where)
    places = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} has the dtype {entry['dtype']}, which is not read; convert it to one of "
                f"{', '.join(DTYPES)}"
            )
        spec = TensorSpec(tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]]))
        start, end = entry["data_offsets"]
        if end > size:
            raise UserError(f"{path} is truncated: {name} ends at byte {end} of {size}; fetch it again")
        if min(spec.shape, default=0) < 0 or start < 0 or end - start != _bytes(spec):
            raise UserError(f"{path} is damaged: {name} of shape {spec.shape} has {end - start} bytes; fetch it again")
        places[name] = (spec, start, end)
    reached = 0
    for name, (_, start, end) in sorted(places.items(), key=lambda place: place[1][1:]):
        if start != reached:
            what = "overlaps the tensor before it" if start < reached else "does not follow the tensor before it"
            raise UserError(f"{path} is damaged: {name} {what}; fetch it again")
        reached = end
    if reached != size:
        raise UserError(f"{path} is damaged: its tensors end at byte {reached} of {size}; fetch it again")
    return places


def write_safetensors(path: str | os.PathLike, specs: dict[str, TensorSpec], tensors: Iterable) -> None:
    """Writes pairs of a name and an array, which must come in the order of `specs` and match it."""
    header, end = {}, 0
    for name, spec in specs.items():
        start, end = end, end + _bytes(spec)
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for (expected, spec), (name, tensor) in zip(specs.items(), tensors, strict=True):
            if (expected, *spec) != (name, tensor.shape, tensor.dtype):
                raise ValueError(f"got {name} {tensor.shape} {tensor.dtype}, expected {expected} {spec}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize
