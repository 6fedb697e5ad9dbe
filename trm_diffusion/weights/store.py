"""Weights on disk in our own format: a `model.safetensors`, keyed by parameter path, and a `manifest.json`.

The manifest says what the weights are (kind, model, parameter count, the sha256 of model.safetensors, which every load
checks) and where they came from (source, layout, sha256). A directory gets its name only when it is complete.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx

import trm_diffusion
from trm_diffusion.errors import UserError
from trm_diffusion.files import check_writable, clear_partial, replacing, sha256_of_file, sha256_of_json, write_json
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.vae import VAE
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import read_json
from trm_diffusion.weights import vae
from trm_diffusion.weights.convert import Weights
from trm_diffusion.weights.safetensors import TensorSpec, read_safetensors, write_safetensors

FORMAT = 1
# Of a manifest: its own fields (the others are the weights' record), and the form of all.
OWN_FIELDS = ("format", "version", "kind", "model", "parameters", "sha256", "model_sha256")
FORM = {
    "format": int, "kind": str, "model": dict, "sha256?": str, "model_sha256?": str,
    "files?": [{"file": str, "sha256": str}],
}  # fmt: skip
MANIFEST, TENSORS = "manifest.json", "model.safetensors"


def save_weights(directory: str | os.PathLike, weights: Weights) -> None:
    """Writes the directory atomically. Raises UserError if it exists or the weights are not usable."""
    with new_directory(directory) as partial:
        write_safetensors(partial / TENSORS, weights.specs, weights.tensors())
        record = {
            "format": FORMAT,
            "version": trm_diffusion.__version__,
            "kind": weights.kind,
            "model": weights.model,
            "parameters": weights.parameters,
            "sha256": sha256_of_file(partial / TENSORS),
            "model_sha256": sha256_of_json([weights.kind, weights.model]),
            **weights.record,
        }
        write_json(partial / MANIFEST, record)


def holds_weights(directory) -> bool:
    """Whether `save_weights` wrote this directory."""
    return (directory / MANIFEST).exists() and (directory / TENSORS).exists()


def load_weights(directory: str | os.PathLike) -> Weights:
    """Opens what `save_weights` wrote, memory-mapped. Raises UserError if it is damaged or of a newer format."""
    directory = local_path(directory)
    record = read_json(directory / MANIFEST, FORM, "convert the weights again")
    if record["format"] > FORMAT:
        raise UserError(
            f"{directory} has format {record['format']}; this version reads up to {FORMAT}: update trm_diffusion"
        )
    model = [record["kind"], record["model"]]
    if record.get("model_sha256") not in (None, sha256_of_json(model)):
        raise UserError(f"{directory / MANIFEST} is damaged: it names another model; convert the weights again")
    tensors = read_safetensors(directory / TENSORS)
    wanted = record.get("sha256")  # absent from weights that an earlier version wrote
    if wanted not in (None, _sha256(directory / TENSORS)):
        raise UserError(f"{directory / TENSORS} is damaged: it is not what {MANIFEST} says; convert the weights again")
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    origin = {name: value for name, value in record.items() if name not in OWN_FIELDS}
    return Weights(record["kind"], record["model"], specs, tensors.__getitem__, origin)


def load_vae(directory: str | os.PathLike, latent_size: int) -> tuple[VAE, LatentSpec]:
    """The autoencoder of a converted directory, and the spec of its latents with `latent_size` cells a side.

    Its id is the hash of the converted weights. Raises UserError if there is no autoencoder.
    """
    directory = local_path(directory)
    if not holds_weights(directory):
        raise UserError(f"{directory} holds no converted autoencoder; --mode=convert --from=SOURCE --to=DIR writes one")
    weights = load_weights(directory)
    if weights.kind != "vae":
        raise UserError(f"{directory} holds a {weights.kind}, not an autoencoder")
    config = vae.config_of(weights.model)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))))
    flat = {path: np.asarray(weights.read("/".join(map(str, path)))) for path, _ in nnx.to_flat_state(state)}
    vae_id = f"sha256:{_sha256(directory / TENSORS)}"
    spec = config.latent_spec(vae_id, latent_size * config.factor)
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), spec


def check_new(directory: str | os.PathLike) -> None:
    """Raises UserError if the directory exists, or could not be made; leaves nothing."""
    if local_path(directory, "--to").exists():
        raise UserError(f"{directory} exists already; choose another --to, or remove it")
    check_writable(directory)


def _sha256(path: Path) -> str:
    """The hash of a file, which is read again only if it has changed: a job opens its weights several times."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    del size, changed
    return sha256_of_file(path)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields a directory to fill, which gets its name at the end. After an error nothing of it is left."""
    directory = local_path(directory, "--to")
    check_new(directory)
    clear_partial(directory.parent, directory.name, below=False)
    with replacing(directory) as partial:
        partial.mkdir()
        yield local_path(partial)
