"""What every job builds from its config: mesh, condition, objective, model and optimiser."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from trm_diffusion.conditions import Condition, make_condition
from trm_diffusion.config import Config
from trm_diffusion.config.rules import check_batch
from trm_diffusion.diffusion.objective import Objective
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.errors import UserError
from trm_diffusion.models.architecture import make_network
from trm_diffusion.runtime import state as train_state
from trm_diffusion.runtime.optimizer import make_optimizer, multipliers
from trm_diffusion.runtime.parameters import Parameters, PureModel
from trm_diffusion.runtime.processes import compiled_together
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.sharding import batch_sharding, batch_shards, make_mesh, models_over
from trm_diffusion.runtime.state import TrainState, state_sharding


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config and the objects it describes, without parameters."""

    config: Config
    mesh: Mesh
    condition: Condition
    objective: Objective
    model: PureModel
    optimizer: optax.GradientTransformation
    abstract_state: TrainState  # shapes, dtypes and shardings

    def abstract_batch(self, size: int) -> dict:
        """Shapes, dtypes and shardings of a batch of `size` images, as the training step takes it."""
        data = self.config.data
        image = jax.ShapeDtypeStruct((data.image_size, data.image_size, data.channels), jnp.float32)
        return jax.tree.map(
            lambda one: jax.ShapeDtypeStruct((size, *one.shape), one.dtype, sharding=batch_sharding(self.mesh)),
            {"image": image, **self.condition.record_shapes},
        )

    def network(self, parameters: Parameters) -> Callable:
        """The model as a function of its inputs, with these parameters; its activations are sharded over the mesh.

        models/architecture.py documents the call; the images have the channels of the data.
        """
        model = self.model.bind(parameters)

        def call(noisy: jax.Array, times: jax.Array, condition: Any, **options):
            with models_over(self.mesh):
                return self.condition.apply(model, noisy, times, condition, **options)

        return call

    def init_state(self) -> TrainState:
        """The state before the first update; each device initialises only its own shards."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return compiled_together(jax.jit(self._init_state, out_shardings=shardings))()

    def _init_state(self) -> TrainState:
        return _init_state(self.config, self.model, self.optimizer)


def build(
    config: Config, devices: Sequence[jax.Device] | None = None, *, condition: Condition | None = None
) -> Experiment:
    """Builds the experiment; reads no file and makes no array. Raises UserError if the config does not fit the devices.

    devices: the devices to use, all by default; described devices (runtime/topology.py) work as well.
    condition: the condition of the config, by default one without a run's directory.
    """
    condition = condition or make_condition(config)
    mesh = make_mesh(config.mesh, divisor=math.gcd(*condition.sharded_widths), devices=devices)
    check_batch(config, batch_shards(mesh))
    objective = make_objective(config.diffusion)
    model = make_model(config, objective, condition)
    optimizer = make_optimizer(config.optim, config.train.updates)
    shapes = jax.eval_shape(lambda: _init_state(config, model, optimizer))
    for pattern in multipliers(config.optim):
        if not fnmatch.filter(shapes.trainable, pattern):
            raise UserError(
                f"config.optim.lr_multipliers has {pattern!r}, which matches no trained parameter; a path looks like "
                f"{min(shapes.trainable, key=len)}"
            )
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, model, shapes),
    )
    return Experiment(config, mesh, condition, objective, model, optimizer, abstract_state)


def make_model(config: Config, objective: Objective, condition: Condition | None = None) -> PureModel:
    """The model of the config as a pure function of its parameters; condition: the config's by default."""
    data = config.data
    condition = condition or make_condition(config)
    return PureModel(
        lambda key: make_network(
            config.model,
            image_size=data.image_size,
            in_channels=condition.input_channels,
            out_channels=objective.output_channels(data.channels),
            num_classes=data.num_classes,
            rngs=nnx.Rngs(key),
        )
    )


def _init_state(config: Config, model: PureModel, optimizer: optax.GradientTransformation) -> TrainState:
    return train_state.init_state(
        model,
        optimizer,
        key_for(config.seed, Purpose.INITIAL_WEIGHTS),
        trainable=config.train.trainable,
        frozen_dtype=config.train.frozen_dtype,
        ema_decays=config.optim.ema_decays,
    )
