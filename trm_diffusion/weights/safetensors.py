"""The safetensors format, read as memory maps and written tensor by tensor, so that no file needs to fit in memory.

A file holds the length of its header (uint64, little-endian); the header, which is JSON from name to dtype, shape and
byte range; and the tensors' bytes, little-endian, row-major, without gaps.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from trm_diffusion.errors import UserError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors by name, memory-mapped and read when used. Raises UserError if the file is truncated or damaged."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = file.read(min(length, size))
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        specs = {
            name: (TensorSpec(tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])), *entry["data_offsets"])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file, or is truncated in its header ({error!r})") from None
    first = LENGTH_BYTES + length
    for name, (spec, start, end) in specs.items():
        if first + end > size:
            raise UserError(
                f"{path} is truncated: {name} ends at byte {first + end}, the file at {size}; fetch it again"
            )
        if end - start != _bytes(spec) or start < 0:
            raise UserError(f"{path} is damaged: {name} of shape {spec.shape} has {end - start} bytes; fetch it again")
    data = np.memmap(path, np.uint8, mode="r")
    return {
        name: data[first + start : first + end].view(spec.dtype).reshape(spec.shape)
        for name, (spec, start, end) in specs.items()
    }


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
    return int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize
