"""PyTorch files, read with PyTorch's loader that runs no code: only tensors, numbers, text and plain containers."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.readers.opening import open_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
NESTED = ("ema", "state_dict", "model")  # keys of the weights in training checkpoints, the preferred first
ZIP = b"PK\x03\x04"  # PyTorch 1.6 and later; older files cannot be memory-mapped
PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")  # dtypes as in NumPy
# dtypes that NumPy lacks: one of the same size, and ml_dtypes'
EXTENDED = {
    "bfloat16": ("uint16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
}
REMEDY = "where you trust the file, load it with PyTorch and torch.save its dict of weights alone"


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a PyTorch file by name: of a dict of tensors, or of the first of NESTED in a training checkpoint.

    Arguments of a training script (argparse.Namespace) may lie beside them. Raises UserError in one line for anything
    else: another object, a list, a bare tensor, or tensors that are sparse, quantized or of another dtype.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read; pip install -r requirements-torch.txt, or give a .safetensors file"
        ) from None
    with open_file(path) as file:
        mmap = file.read(len(ZIP)) == ZIP
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # holds attributes, and does nothing
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001  zip, pickle and runtime errors all mean that the file cannot be used
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is truncated, or holds more than weights ({reason}); {REMEDY}") from None
    return dict(_arrays(torch, _weights_in(torch, loaded, path), path))


def _weights_in(torch, loaded: Any, path: Path) -> dict[str, Any]:
    """The dict of tensors in what a file holds. Raises UserError if there is none."""
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors by name; {REMEDY}")
    while key := next((key for key in NESTED if isinstance(loaded.get(key), dict)), None):
        loaded = loaded[key]
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        keys = ", ".join(map(str, list(loaded)[:5])) or "none"
        raise UserError(f"{path} holds no dict of tensors by name; its keys are {keys}; {REMEDY}")
    return tensors


def _arrays(torch, tensors: dict[str, Any], path: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or dtype not in (*PLAIN, *EXTENDED):
            kind = f"{str(tensor.layout).removeprefix('torch.')} {dtype} on {tensor.device.type}"
            raise UserError(f"{path}: the tensor {name} is {kind}, which is not read; {REMEDY}, dense and in float32")
        tensor = tensor.detach().resolve_neg()
        if dtype in EXTENDED:
            same_size, extended = EXTENDED[dtype]
            yield name, tensor.view(getattr(torch, same_size)).numpy().view(extended)
        else:
            yield name, tensor.numpy()
