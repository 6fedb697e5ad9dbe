"""What every job builds from its config: the mesh, the objective, the model and its optimiser."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from trm_diffusion.config import Config
from trm_diffusion.config.rules import check_batch
from trm_diffusion.diffusion.objective import Objective
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.models.architecture import make_network, null_condition
from trm_diffusion.models.text import Text
from trm_diffusion.runtime.optimizer import make_optimizer
from trm_diffusion.runtime.parameters import Parameters, PureModel
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, batch_shards, make_mesh, models_over
from trm_diffusion.runtime.state import TrainState, initial_state, state_sharding


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config and the objects it describes; holds no arrays of the model's."""

    config: Config
    mesh: Mesh
    objective: Objective
    model: PureModel
    optimizer: optax.GradientTransformation
    abstract_state: TrainState  # shapes, dtypes and shardings
    null_text: Text | None = None  # NumPy, no batch axis: the empty text, of a model whose texts are encoded before

    @property
    def null_condition(self) -> Any:
        """One image's condition that stands for none: a label, word ids [L], or a `Text`, without the batch axis."""
        return self.null_text or null_condition(self.config.model, self.config.data.num_classes)

    def condition_of(self, batch: dict) -> Any:
        """What the model is conditioned on, out of a batch of the data: labels [B], word ids [B, L], or a `Text`."""
        model = self.config.model
        if model.architecture == "dit":
            return batch["label"]
        return batch["tokens"] if model.reads_words else Text(*(batch[name] for name in Text._fields))

    def abstract_batch(self, size: int) -> dict:
        """The shapes of a batch of this many images, as `condition_of` reads it, divided over the mesh."""
        data, model = self.config.data, self.config.model

        def rows(shape, dtype):
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=batch_sharding(self.mesh))

        condition = jax.tree.map(lambda null: rows(null.shape, null.dtype), self.null_condition)
        if isinstance(condition, Text):
            condition = condition._asdict()
        else:
            condition = {"tokens" if model.reads_words else "label": condition}
        return {"image": rows((data.image_size, data.image_size, data.channels), jnp.float32), **condition}

    def network(self, parameters: Parameters) -> Callable:
        """The model with these values, its activations laid over the mesh; called as models/architecture.py says."""
        model = self.model.bind(parameters)

        def call(*inputs, **options):
            with models_over(self.mesh):
                return model(*inputs, **options)

        return call

    def fresh_state(self) -> TrainState:
        """The state before the first update, made shard by shard on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(self._initial_state, out_shardings=shardings)()

    def _initial_state(self) -> TrainState:
        return _initial_state(self.config, self.model, self.optimizer)


def build(config: Config, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Builds without touching a file or making an array. Raises UserError where the config does not fit the devices.

    devices: those to use, all by default; they may be described alone.
    """
    mesh = make_mesh(config.mesh, divisor=_shared_width(config), devices=devices)
    check_batch(config, batch_shards(mesh))
    objective = make_objective(config.diffusion)
    model = make_model(config, objective)
    optimizer = make_optimizer(config.optim, config.train.updates)
    shapes = jax.eval_shape(lambda: _initial_state(config, model, optimizer))
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, model, shapes),
    )
    return Experiment(config, mesh, objective, model, optimizer, abstract_state)


def _shared_width(config: Config) -> int:
    """What the number of parameters' shards must divide: every axis that is laid over them."""
    model = config.model
    return math.gcd(model.width, model.text.features) if model.reads_words else model.width


def make_model(config: Config, objective: Objective) -> PureModel:
    """The model of the config as a pure function of its parameters."""
    data = config.data
    return PureModel(
        lambda key: make_network(
            config.model,
            image_size=data.image_size,
            in_channels=data.channels,
            out_channels=objective.output_channels(data.channels),
            num_classes=data.num_classes,
            rngs=nnx.Rngs(key),
        )
    )


def _initial_state(config: Config, model: PureModel, optimizer) -> TrainState:
    return initial_state(
        model,
        optimizer,
        key_for(config.seed, Purpose.INITIAL_WEIGHTS),
        trainable=config.train.trainable,
        frozen_dtype=config.train.frozen_dtype,
        ema_decays=config.optim.ema_decays,
    )
