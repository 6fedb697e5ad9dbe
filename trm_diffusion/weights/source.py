"""Opens published weights as tensors by name, from a file, a directory or a model hub."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file
from trm_diffusion.weights.safetensors import read_safetensors

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
NESTED = ("ema", "state_dict", "model")  # keys of the weights in training checkpoints, the preferred first
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    name: str  # as the user gave it
    files: tuple[Path, ...]
    tensors: dict[str, np.ndarray]  # memory-mapped where the format allows it
    config: dict  # the config.json beside the weights, as diffusers writes it, or {}

    def record(self) -> dict:
        """Where the weights came from, for a manifest. Reads every file once, to hash it."""
        files = [{"file": path.name, "sha256": sha256_of_file(path)} for path in self.files]
        return {"source": self.name, "files": files}


def open_source(name: str) -> PublishedWeights:
    """Opens a .safetensors or PyTorch file, a directory with one (or with shards and an index), or a hub id.

    A hub id is OWNER/NAME, optionally followed by a slash and a folder or file in it. Raises UserError in one line.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if path.suffix or not HUB_ID.fullmatch(name):
            raise UserError(f"{name}: no such file or directory")
        path = _download(name)
    files = _files(path)
    tensors = {}
    for file in files:
        tensors |= read_torch(file) if file.suffix in TORCH_SUFFIXES else read_safetensors(file)
    beside = files[0].parent / "config.json"
    return PublishedWeights(name, tuple(files), tensors, json.loads(beside.read_text()) if beside.exists() else {})


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        shards = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        for shard in shards:
            if not (path / shard).exists():
                raise UserError(f"{path / shard} is missing, but {indices[0].name} lists it; fetch it again")
        return [path / shard for shard in shards]
    single = [path / name for name in SINGLE_FILES if (path / name).exists()] or sorted(path.glob("*.safetensors"))
    if len(single) != 1:
        found = f"holds {', '.join(file.name for file in single)}" if single else "holds no .safetensors file"
        raise UserError(f"{path} {found}; name one file, or the folder of one model")
    return single


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a PyTorch file by name, with the loader that executes no code. Raises UserError in one line."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read; pip install -r requirements-torch.txt, or give a .safetensors file"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  zip, pickle and runtime errors all mean that the file cannot be used
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is truncated, or holds more than weights ({reason})") from None
    for name in NESTED:
        loaded = loaded[name] if isinstance(loaded.get(name), dict) else loaded
    return {name: _to_numpy(torch, value) for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _to_numpy(torch, tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such file or directory; to fetch it from the hub, pip install huggingface_hub"
        ) from None
    owner, repository, *rest = name.split("/")
    inside = "/".join(rest)
    patterns = [f"{inside}/*.safetensors", f"{inside}/*.json", inside] if inside else ["*.safetensors", "*.json"]
    try:
        with contextlib.redirect_stderr(None):
            return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=patterns)) / inside
    except Exception as error:  # noqa: BLE001  whatever went wrong, the line says what and where
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: no such file or directory, and the download from the hub failed ({reason})") from None
