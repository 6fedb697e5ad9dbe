"""The state of a run: restored from a checkpoint, or initialised as the config says.

A run starts from, in this order:
    1. the latest checkpoint in its own workdir, or that of `config.init.step`: resumes bit-exactly, including the data
       iterator;
    2. `config.init.workdir`, another run (its first EMA) or a directory of weights (weights/store.py), plus the gates
       and experts of `config.init.adapter` if given: loads parameters only, with a fresh optimiser state;
    3. scratch.
"""

import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
from etils import epath

from trm_diffusion.conditions import DATA, make_condition
from trm_diffusion.conditions.text import JOINT_FIELDS
from trm_diffusion.config import Config
from trm_diffusion.data.pipeline import BatchIterator
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.stack import from_per_layer, per_layer
from trm_diffusion.readers.paths import any_path
from trm_diffusion.run.workdir import changed_fields, load_config, save_config
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters
from trm_diffusion.runtime.processes import is_main_process
from trm_diffusion.runtime.state import TrainState
from trm_diffusion.weights.adapters import base_sha256, check_adapter
from trm_diffusion.weights.store import holds_weights, load_weights

# Config fields that must match to load weights, besides array shapes; the image size may differ.
FIXED = {"depth", "width", "heads", "patch", "mlp_ratio", "qk_norm", "in_channels", "out_channels", *JOINT_FIELDS}


def load_run(config: Config, workdir: epath.Path, reads: str = DATA) -> tuple[Experiment, TrainState]:
    """Restores the latest checkpoint of the run in `workdir`, or that of `config.init.step`.

    The config may sample and evaluate in another way.

    Writes and deletes nothing: the run may be training, and saving, at this moment.
    Without a run there, loads what `config.init` names. reads: where conditions come from, conditions.DATA or PROMPTS.
    """
    condition = make_condition(config, workdir, reads)
    if config.init.workdir and not (workdir / "checkpoints").exists():
        experiment = build(config, condition=condition)
        return experiment, state_from_pretrained(experiment)
    changes = changed_fields(workdir, config)  # raises if the model differs
    experiment = build(config, condition=condition)
    if not (workdir / "checkpoints").exists():  # opening them would make the directory
        raise UserError(f"{workdir} holds no checkpoint yet; train first")
    with Checkpoints(workdir / "checkpoints", config.checkpoint, writes=False) as checkpoints:
        step = _step_to_restore(config, checkpoints, changes)
        if step is None:
            raise UserError(f"{workdir} holds no checkpoint yet; train first")
        state, _ = checkpoints.restore(step, experiment.abstract_state)
    return experiment, state


def _step_to_restore(config: Config, checkpoints: Checkpoints, changes: list[str]) -> int | None:
    """The latest checkpoint, or the one of `config.init.step`; None if there is none.

    changes: the fields that differ from the run's saved config. With none, the same command was started again, as a
    scheduler does after a stop; it must not go back a second time.
    """
    step, steps = config.init.step, checkpoints.steps()
    if step is None or not steps or not changes:
        return checkpoints.latest_step()
    if step not in steps:
        raise UserError(
            f"config.init.step is {step}, but {checkpoints.directory} has the checkpoints "
            f"{', '.join(map(str, steps))}; give one of them, or leave init.step out for the newest"
        )
    return step


def sampling_parameters(experiment: Experiment, state: TrainState) -> Parameters:
    """The raw or EMA parameters, as `sample.parameters` says."""
    which = experiment.config.sample.parameters
    if which == "raw":
        return state.parameters
    decay = str(experiment.config.optim.ema_decays[0]) if which == "ema" else which
    return {**state.ema[decay], **state.frozen}


def layers_of_run(workdir: epath.Path) -> Parameters:
    """A run's sampling parameters (by default the first EMA), unstacked into blocks by `models.stack.per_layer`."""
    experiment, state = load_run(load_config(workdir), workdir)
    return per_layer(sampling_parameters(experiment, state), stack_layout(experiment.config.model))


def restore_or_init(
    experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints, iterator: BatchIterator
) -> tuple[TrainState, dict]:
    """The state to train from and the loop's record, by the order at the top of this file.

    Restores the position of the iterator, and saves the config to the workdir.
    """
    config = experiment.config
    if checkpoints.latest_step() is not None:
        changes = changed_fields(workdir, config)
        step = _step_to_restore(config, checkpoints, changes)
        state, loop = checkpoints.restore(step, experiment.abstract_state, iterator)
        aside = checkpoints.set_aside_newer(step)
        say(f"resuming {workdir} at update {step}" + (f" with {'; '.join(changes)}" if changes else ""))
        if aside:
            say(f"newer checkpoints are set aside, and may be deleted: {', '.join(map(str, aside))}")
    elif config.init.step is not None:
        raise UserError(f"config.init.step is {config.init.step}, but {workdir} holds no checkpoint; leave it out")
    elif config.init.workdir:
        state, loop = state_from_pretrained(experiment), {}
        added = f" with {config.init.adapter}" if config.init.adapter else ""
        say(f"starting {workdir} from the parameters of {config.init.workdir}{added}")
    else:
        state, loop = experiment.init_state(), {}
        say(f"starting {workdir} from scratch")
    if is_main_process():
        save_config(workdir, config)
    return state, loop


def state_from_pretrained(experiment: Experiment) -> TrainState:
    """A fresh state with the parameters that `config.init` names; `init.missing` must match each one they lack.

    Raises UserError for a missing parameter, or for parameters of another model or an adapter of another base.
    """
    config, model = experiment.config, experiment.model
    layout = stack_layout(config.model)
    adapter = config.init.adapter
    layers = _pretrained_layers(any_path(config.init.workdir, "config.init.workdir"), config)
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
            "name parameters to initialise in config.init.missing"
        )

    def put(current: Parameters) -> Parameters:
        return {
            name: jax.device_put(jnp.asarray(found.get(name, leaf), leaf.dtype), leaf.sharding)
            for name, leaf in current.items()
        }

    state = experiment.init_state()
    trainable, frozen = put(state.trainable), put(state.frozen)
    if adapter and base_sha256(per_layer({**trainable, **frozen}, layout)) != added.record["base_sha256"]:
        raise UserError(
            f"config.init.adapter {adapter} was trained on other weights than {config.init.workdir}, "
            "or with another config.train.frozen_dtype; give the weights it was trained on"
        )
    ema = {decay: jax.tree.map(jnp.copy, trainable) for decay in state.ema}
    return dataclasses.replace(state, trainable=trainable, frozen=frozen, ema=ema)


def _pretrained_layers(path: epath.Path, config: Config) -> dict:
    """The parameters of a run or a directory of weights, unstacked into blocks."""
    if not holds_weights(path):
        return layers_of_run(path)
    weights = load_weights(path)
    wanted = model_of(config)
    if weights.kind != config.model.architecture:
        raise UserError(f"config.init.workdir {path} holds a {weights.kind}, not a {config.model.architecture}")
    for name in sorted(FIXED & weights.model.keys()):
        if weights.model[name] is not None and weights.model[name] != wanted[name]:
            raise UserError(f"config.init.workdir {path} has {name} {weights.model[name]}, this config {wanted[name]}")
    return dict(weights.tensors())


def model_of(config: Config) -> dict:
    """The fields that a weights manifest stores about the model of a config."""
    model = config.model
    condition = make_condition(config)
    fields = {name: getattr(model, name) for name in ("depth", "width", "heads", "patch", "mlp_ratio")}
    fields |= dict(
        image_size=config.data.image_size,
        in_channels=condition.input_channels,
        out_channels=make_objective(config.diffusion).output_channels(config.data.channels),
    )
    if model.recursion.blocks != "none":
        fields["recursion"] = dataclasses.asdict(model.recursion)
    return fields | condition.model_fields
