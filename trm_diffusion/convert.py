"""The conversion job: published weights into a directory of ours, and a run's or a directory's weights out again."""

import json
from pathlib import Path

import numpy as np
from etils import epath

from trm_diffusion.config import Config
from trm_diffusion.diffusion.objective import make_objective
from trm_diffusion.errors import UserError
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.workdir import load_config
from trm_diffusion.sample import layers_of_run
from trm_diffusion.weights.convert import LAYOUTS, Weights, to_ours, to_theirs
from trm_diffusion.weights.safetensors import TensorSpec, write_safetensors
from trm_diffusion.weights.source import open_source
from trm_diffusion.weights.store import holds_weights, load_weights, new_directory, save_weights

JOINT_FIELDS = ("dual_attention_blocks", "position_max_size", "position_base_size")
# What must agree for weights to mean the same, of which shapes do not tell all; an image may have another size.
FIXED = {"depth", "width", "heads", "patch", "mlp_ratio", "qk_norm", "in_channels", "out_channels", *JOINT_FIELDS}
DIFFUSERS_FILE, PLAIN_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


def convert(source: str, destination: str, layout: str = "", to_layout: str = "", dtype: str = "") -> None:
    """Reads `source`, a run, a directory of ours or published weights, and writes the directory `destination`.

    to_layout "" writes a directory of ours, that `config.init.workdir` can start a run from; else safetensors with that
    layout's names. Raises UserError in one line, and then has written nothing.
    """
    if not source or not destination:
        raise UserError("--mode=convert needs --from=PATH_OR_HUB_ID and --to=DIR")
    for flag, name in (("layout", layout), ("to-layout", to_layout)):
        if name and name not in LAYOUTS:
            raise UserError(f"--{flag}={name} is none of {', '.join(LAYOUTS)}")
    weights = _open(source, layout, dtype)
    if to_layout:
        specs, tensors = to_theirs(weights, to_layout, source)
        with new_directory(destination) as partial:
            config = LAYOUTS[to_layout].config
            if config:
                (partial / "config.json").write_text(json.dumps(config(weights.model), indent=2) + "\n")
            write_safetensors(partial / (DIFFUSERS_FILE if config else PLAIN_FILE), specs, tensors)
    else:
        save_weights(destination, weights)
    what = f"a {weights.kind} of {weights.parameters:,} parameters"
    say(f"{source} ({weights.record.get('layout', 'a run')}): {what} written to {destination} ({to_layout or 'ours'})")


def _open(source: str, layout: str, dtype: str) -> Weights:
    path = Path(source).expanduser()
    if holds_weights(path):
        return load_weights(path)
    if (path / "checkpoints").is_dir():
        return _of_run(path)
    return to_ours(open_source(source), layout, dtype)


def _of_run(workdir: Path) -> Weights:
    """A run's parameters (first average)."""
    layers = {name: np.asarray(value) for name, value in layers_of_run(epath.Path(workdir)).items()}
    specs = {name: TensorSpec(value.shape, value.dtype) for name, value in layers.items()}
    config = load_config(epath.Path(workdir))
    return Weights(config.model.architecture, model_of(config), specs, layers.__getitem__, {"source": str(workdir)})


def model_of(config: Config) -> dict:
    """What a manifest says of the model that a config describes."""
    model, channels = config.model, config.data.channels
    fields = {name: getattr(model, name) for name in ("depth", "width", "heads", "patch", "mlp_ratio")}
    fields |= dict(
        image_size=config.data.image_size,
        in_channels=channels,
        out_channels=make_objective(config.diffusion).output_channels(channels),
    )
    if model.architecture == "dit":
        return fields | {"num_classes": config.data.num_classes}
    fields |= {name: getattr(model.mmdit, name) for name in JOINT_FIELDS} | {"qk_norm": model.qk_norm}
    return fields | {"text_features": model.text.features, "pooled_features": model.text.pooled_features}


def starting_layers(path: epath.Path, config: Config) -> dict:
    """The parameters that `config.init.workdir` names, of a run or a directory of ours, each block on its own."""
    if not holds_weights(path):
        return layers_of_run(path)
    weights, wanted = load_weights(path), model_of(config)
    if weights.kind != config.model.architecture:
        raise UserError(f"config.init.workdir {path} holds a {weights.kind}, not a {config.model.architecture}")
    for name in sorted(FIXED & weights.model.keys()):
        if weights.model[name] is not None and weights.model[name] != wanted[name]:
            raise UserError(f"config.init.workdir {path} has {name} {weights.model[name]}, this config {wanted[name]}")
    return {name: weights.read(name) for name in weights.specs}
