"""The conversion job: published weights to our format, and the weights of a run or a directory to published formats."""

import dataclasses
from pathlib import Path

import numpy as np

from trm_diffusion.config import Config
from trm_diffusion.errors import UserError
from trm_diffusion.files import write_json
from trm_diffusion.readers.paths import any_path, local_path
from trm_diffusion.run.decoder import kept_spec
from trm_diffusion.run.restore import layers_of_run, model_of
from trm_diffusion.run.workdir import load_config
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.weights.adapters import adapter_of, merged
from trm_diffusion.weights.convert import LAYOUTS, Weights, in_dtype, to_ours, to_theirs
from trm_diffusion.weights.safetensors import TensorSpec, write_safetensors
from trm_diffusion.weights.source import open_source
from trm_diffusion.weights.store import check_new, holds_weights, load_weights, new_directory, save_weights

DIFFUSERS_FILE, PLAIN_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
ADAPTER = "adapter"  # given instead of a layout: only gates and experts


def convert(
    source: str, destination: str, layout: str = "", to_layout: str = "", dtype: str = "", merge: bool = False
) -> None:
    """Reads a run, a directory of weights in our format, or published weights, and writes the directory `destination`.

    to_layout: "" writes our format, which `config.init.workdir` can start from; "adapter" writes only gates and
    experts, for `config.init.adapter`; a layout writes safetensors with its names. merge: first merge experts into the
    base weights. Raises a one-line UserError, and then writes nothing.
    """
    if not source or not destination:
        raise UserError("--mode=convert needs --from=PATH_OR_HUB_ID and --to=DIR")
    for flag, name, known in (("layout", layout, [*LAYOUTS]), ("to-layout", to_layout, [*LAYOUTS, ADAPTER])):
        if name and name not in known:
            raise UserError(f"--{flag}={name} is none of {', '.join(known)}")
    check_new(destination)
    weights = _open(source, layout)
    if dtype:
        weights = in_dtype(weights, dtype, source)
    if merge:
        weights = merged(weights, source)
    if to_layout == ADAPTER:
        weights = adapter_of(weights, source)
        save_weights(destination, weights)
    elif to_layout:
        specs, tensors = to_theirs(weights, to_layout, source)
        with new_directory(destination) as partial:
            config = LAYOUTS[to_layout].config
            if config:
                write_json(partial / "config.json", config(weights.model))
            write_safetensors(partial / (DIFFUSERS_FILE if config else PLAIN_FILE), specs, tensors)
    else:
        save_weights(destination, weights)
    what = f"a {weights.kind} of {weights.parameters:,} parameters"
    say(f"{source} ({weights.record.get('layout', 'a run')}): {what} written to {destination} ({to_layout or 'ours'})")


def _open(source: str, layout: str) -> Weights:
    path = local_path(source, "--from")
    if holds_weights(path):
        return load_weights(path)
    if (path / "checkpoints").is_dir():
        return _of_run(path)
    return to_ours(open_source(source), layout)


def _of_run(workdir: Path) -> Weights:
    """A run's sampling parameters (by default the first EMA)."""
    path = any_path(workdir)
    weights = weights_of(load_config(path), layers_of_run(path), str(workdir))
    spec = kept_spec(path)
    latent = {"latent": dataclasses.asdict(spec)} if spec else {}
    return dataclasses.replace(weights, record=weights.record | latent)


def weights_of(config: Config, layers: Parameters, source: str) -> Weights:
    """Wraps parameters of the config's model; layers: unstacked into blocks."""
    values = {name: np.asarray(value) for name, value in layers.items()}
    specs = {name: TensorSpec(value.shape, value.dtype) for name, value in values.items()}
    return Weights(config.model.architecture, model_of(config), specs, values.__getitem__, {"source": source})
