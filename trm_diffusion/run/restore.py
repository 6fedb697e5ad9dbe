"""A run's parameters: those of its checkpoint, or those that it is configured to start from.

`config.init` names another run or a directory of weights (weights/store.py), and perhaps gates and experts that were
exported alone, to be laid onto it.
"""

import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
from etils import epath

from trm_diffusion.config import Config
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.stack import from_per_layer, per_layer
from trm_diffusion.run.workdir import changed_fields, load_config
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.weights.adapters import base_sha256, check_adapter
from trm_diffusion.weights.store import holds_weights, load_weights

JOINT_FIELDS = ("dual_attention_blocks", "position_max_size", "position_base_size")
# What must agree for weights to mean the same, of which shapes do not tell all; an image may have another size.
FIXED = {"depth", "width", "heads", "patch", "mlp_ratio", "qk_norm", "in_channels", "out_channels", *JOINT_FIELDS}


def load_run(config: Config, workdir: epath.Path) -> tuple[Experiment, TrainState]:
    """The latest checkpoint of the run in `workdir`, for a config that may differ in how it samples and evaluates.

    Where nothing was trained there, what `config.init` names.
    """
    if config.init.workdir and not (workdir / "checkpoints").exists():
        experiment = build(config)
        return experiment, started_state(experiment)
    changed_fields(workdir, config)  # refuses another model
    experiment = build(config)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        latest = checkpoints.latest_step()
        if latest is None:
            raise UserError(f"{workdir} holds no checkpoint yet; train first")
        state, _ = checkpoints.restore(latest, experiment.abstract_state)
    return experiment, state


def sampling_parameters(experiment: Experiment, state: TrainState) -> Parameters:
    """The parameters that `sample.parameters` names."""
    which = experiment.config.sample.parameters
    if which == "raw":
        return state.parameters
    decay = str(experiment.config.optim.ema_decays[0]) if which == "ema" else which
    return {**state.ema[decay], **state.frozen}


def layers_of_run(workdir: epath.Path) -> Parameters:
    """The parameters (first average) of a run, each block on its own, as `models.stack.per_layer` names them."""
    experiment, state = load_run(load_config(workdir), workdir)
    return per_layer(sampling_parameters(experiment, state), stack_layout(experiment.config.model))


def started_state(experiment: Experiment) -> TrainState:
    """A fresh state with every parameter that `config.init` has; one it lacks must be named by `init.missing`.

    Raises UserError where something is lacking, or belongs to another model or another base.
    """
    config, model = experiment.config, experiment.model
    layout, adapter = stack_layout(config.model), config.init.adapter
    layers = _initial_layers(epath.Path(config.init.workdir), config)
    if adapter:
        added = load_weights(adapter)
        check_adapter(added, model_of(config), adapter)
        layers = {**layers, **dict(added.tensors())}
    found = from_per_layer(layers, list(model.shapes), layout)
    allowed = config.init.missing.split(",")
    lacking = [
        name
        for name, shape in model.shapes.items()
        if (name not in found or found[name].shape != shape.shape)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in allowed)
    ]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UserError(
            f"config.init.workdir {config.init.workdir} has no fitting {', '.join(lacking[:3])}{more}; "
            "name what may start fresh in config.init.missing"
        )

    def put(current: Parameters) -> Parameters:
        return {
            name: jax.device_put(jnp.asarray(found.get(name, leaf), leaf.dtype), leaf.sharding)
            for name, leaf in current.items()
        }

    state = experiment.fresh_state()
    trainable, frozen = put(state.trainable), put(state.frozen)
    if adapter and base_sha256(per_layer({**trainable, **frozen}, layout)) != added.record["base_sha256"]:
        raise UserError(
            f"config.init.adapter {adapter} was trained on other weights than {config.init.workdir}, "
            "or on the same in another config.train.frozen_dtype"
        )
    ema = {decay: jax.tree.map(jnp.copy, trainable) for decay in state.ema}
    return dataclasses.replace(state, trainable=trainable, frozen=frozen, ema=ema)


def _initial_layers(path: epath.Path, config: Config) -> dict:
    """The parameters of a run or a directory of weights, each block on its own."""
    if not holds_weights(path):
        return layers_of_run(path)
    weights, wanted = load_weights(path), model_of(config)
    if weights.kind != config.model.architecture:
        raise UserError(f"config.init.workdir {path} holds a {weights.kind}, not a {config.model.architecture}")
    for name in sorted(FIXED & weights.model.keys()):
        if weights.model[name] is not None and weights.model[name] != wanted[name]:
            raise UserError(f"config.init.workdir {path} has {name} {weights.model[name]}, this config {wanted[name]}")
    return dict(weights.tensors())


def model_of(config: Config) -> dict:
    """What a manifest says of the model that a config describes."""
    model, channels = config.model, config.data.channels
    fields = {name: getattr(model, name) for name in ("depth", "width", "heads", "patch", "mlp_ratio")}
    fields |= dict(
        image_size=config.data.image_size,
        in_channels=channels,
        out_channels=make_objective(config.diffusion).output_channels(channels),
    )
    if model.recursion.blocks != "none":
        fields["recursion"] = dataclasses.asdict(model.recursion)
    if model.architecture == "dit":
        return fields | {"num_classes": config.data.num_classes}
    fields |= {name: getattr(model.mmdit, name) for name in JOINT_FIELDS} | {"qk_norm": model.qk_norm}
    return fields | {"text_features": model.text.features, "pooled_features": model.text.pooled_features}
