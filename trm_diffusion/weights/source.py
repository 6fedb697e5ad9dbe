"""Opens published weights as tensors by name, from a file, a directory or a model hub."""

import contextlib
import dataclasses
import re
from pathlib import Path

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import read_json
from trm_diffusion.weights.safetensors import read_safetensors
from trm_diffusion.weights.torch_files import TORCH_SUFFIXES, read_torch

SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of all names, by DistributedDataParallel and torch.compile
INDEX = ".safetensors.index.json"
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
    path = local_path(name)
    if not path.exists():
        if path.suffix or not HUB_ID.fullmatch(name):
            raise UserError(f"{name}: no such file or directory")
        path = _download(name)
    files = _files(path)
    tensors = {}
    for file in files:
        tensors |= read_torch(file) if file.suffix in TORCH_SUFFIXES else read_safetensors(file)
    beside = files[0].parent / "config.json"
    config = read_json(beside) if beside.exists() else {}
    if not tensors:
        raise UserError(f"{name} holds no tensors")
    return PublishedWeights(name, tuple(files), without_wrappers(tensors), config)


def without_wrappers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefixes that wrappers of a model put before every name; a prefix of only some names stays."""
    while prefix := next((one for one in WRAPPERS if all(name.startswith(one) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    indices = list_files(path, [INDEX])
    if indices:
        shards = sorted(set(read_json(path / indices[0], {"weight_map": {str: str}})["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise UserError(f"{path / indices[0]} lists {shard}, which is not the name of a file beside it")
            if not (path / shard).exists():
                raise UserError(f"{path / shard} is missing, but {indices[0]} lists it; fetch it again")
        return [path / shard for shard in shards]
    names = list_files(path, [".safetensors"])
    single = [path / name for name in SINGLE_FILES if name in names] or [path / name for name in names]
    if len(single) != 1:
        found = f"holds {', '.join(file.name for file in single)}" if single else "holds no .safetensors file"
        raise UserError(f"{path} {found}; name one file, or the folder of one model")
    return single


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
