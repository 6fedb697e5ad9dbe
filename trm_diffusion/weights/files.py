"""Named tensors from a file: .safetensors with NumPy alone, .pth where PyTorch is installed."""

import json

import ml_dtypes
import numpy as np
from etils import epath

from trm_diffusion.errors import UserError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """Tensors by name. Raises UserError for a file that is missing, unreadable or of another kind."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such weights file")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in (".pth", ".pt"):
        return _read_pytorch(file)
    raise UserError(f"{path}: weights are read from .safetensors or .pth files")


def _read_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        entries = json.loads(content[8:start])
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            flat = np.frombuffer(content[start + first : start + last], DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
        return tensors
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a whole .safetensors file ({error}); fetch it again") from error


def _read_pytorch(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} needs PyTorch to be read; pip install torch, or convert it once elsewhere with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'inception.safetensors')"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.numpy() for name, tensor in state.items()}
    except Exception as error:  # noqa: BLE001  unpickling fails in many ways
        raise UserError(f"{file} is not a PyTorch file of tensors ({str(error).splitlines()[0]})") from error
