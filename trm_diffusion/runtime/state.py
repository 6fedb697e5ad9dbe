"""The training state: everything that a training step reads and writes, and therefore what a checkpoint holds."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from trm_diffusion.runtime.parameters import Parameters, PureModel, trainable_names
from trm_diffusion.runtime.sharding import parameter_sharding, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Random keys are not stored: each is folded from (seed, step, purpose), so none is lost on resume."""

    step: jax.Array  # int32, updates done
    trainable: Parameters  # float32
    frozen: Parameters  # non-trainable parameters: no gradient, moments or EMA; float32 or, outside recursion, bfloat16
    optimizer: optax.OptState  # of the trainable parameters
    ema: dict[str, Parameters]  # decay as a string -> EMA of the trainable parameters, float32

    @property
    def parameters(self) -> Parameters:
        return {**self.trainable, **self.frozen}


def init_state(
    model: PureModel, optimizer: optax.GradientTransformation, key, *, trainable: str, frozen_dtype: str, ema_decays
) -> TrainState:
    """The initial state. Pure: jit it with `state_sharding` as its output sharding."""
    parameters = model.init(key)
    names = set(trainable_names(parameters, trainable))
    trained = {name: value for name, value in parameters.items() if name in names}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trained,
        frozen={
            name: value if "/recursion/" in name else value.astype(frozen_dtype)
            for name, value in parameters.items()
            if name not in names
        },
        optimizer=optimizer.init(trained),
        ema={str(decay): jax.tree.map(lambda p: p.astype(jnp.float32), trained) for decay in ema_decays},
    )


def state_sharding(mesh, model: PureModel, abstract_state: TrainState):
    """Shardings of a state: leaves with the name and shape of a parameter follow it, all others are replicated."""

    def place(path, leaf):
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        for name in names:
            if name in model.logical_axes and leaf.shape == model.shapes[name].shape:
                return parameter_sharding(mesh, name, model.logical_axes[name])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_state)
