"""Where published weights come from: a file, a directory, or a model hub; all of them tensors by name."""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.weights.safetensors import read_safetensors

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
NESTED = ("ema", "state_dict", "model")  # where training checkpoints keep the weights, the best first
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    name: str  # as it was asked for
    files: tuple[Path, ...]
    tensors: dict[str, np.ndarray]  # memory-mapped where the format allows it
    config: dict  # the config.json beside the weights, as diffusers writes it, or {}

    def record(self) -> dict:
        """What a manifest says of where weights came from; reads every file once."""
        return {"source": self.name, "files": [{"file": path.name, "sha256": sha256(path)} for path in self.files]}


def open_source(name: str) -> PublishedWeights:
    """Opens a .safetensors or PyTorch file, a directory of one (or of shards with an index), or a hub id.

    A hub id is OWNER/NAME, with a folder or a file of it after another slash. Raises UserError in one line.
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
                raise UserError(f"{path / shard} is missing, which {indices[0].name} names; fetch it again")
        return [path / shard for shard in shards]
    single = [path / name for name in SINGLE_FILES if (path / name).exists()] or sorted(path.glob("*.safetensors"))
    if len(single) != 1:
        found = f"holds {', '.join(file.name for file in single)}" if single else "holds no .safetensors file"
        raise UserError(f"{path} {found}; name one file, or the folder of one model")
    return single


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a PyTorch file by name, by its loader that executes nothing. Raises UserError in one line."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read; pip install -r requirements-torch.txt, or give a .safetensors file"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  zip, pickle and runtime errors alike mean that the file cannot be used
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is truncated, or is not a file of weights alone ({reason})") from None
    for name in NESTED:
        loaded = loaded[name] if isinstance(loaded.get(name), dict) else loaded
    return {name: _to_numpy(torch, value) for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _to_numpy(torch, tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has none of its own
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
        raise UserError(f"{name}: no such file or directory, and the hub did not give it ({reason})") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
