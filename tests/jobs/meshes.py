"""Trains and samples tiny models on meshes of up to eight simulated devices; see test_devices.py.

    python -m tests.jobs.meshes DIRECTORY

writes DIRECTORY/MODEL_MESH.npz: the metrics of each update, the gradient of the last (the optimiser's first moment, as
b1 = 0), and samples; and, for a few meshes, the same after resuming from the checkpoint of another mesh.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.jobs.tiny import tiny_config
from trm_diffusion.conditions import make_condition
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.experiment import build
from trm_diffusion.jobs.sample import make_sample_fn
from trm_diffusion.jobs.train_step import make_train_step
from trm_diffusion.models.recursion.assignment import assign, expert_capacity
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.dispatch import IMPLEMENTATIONS
from trm_diffusion.models.recursion.gate import Conditioning
from trm_diffusion.models.recursion.pool import Pool
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.parameters import PureModel
from trm_diffusion.runtime.sharding import MeshConfig, batch_sharding, make_mesh, models_over

UPDATES, MORE = 5, 2
TOKENS, WIDTH, EXPERTS, RANK = 16, 64, 8, 4
MESHES = {  # name: devices, axes
    "one": (1, {}),
    "data": (8, {}),
    "fsdp": (8, {"mesh__fsdp": 8}),
    "tensor": (8, {"mesh__tensor": 8}),
    "expert": (8, {"mesh__expert": 8}),
    "mixed": (8, {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__expert": 2}),
}
HEIRS = {"one": (1, {}), "two": (2, {"mesh__expert": 2}), "four": (4, {"mesh__fsdp": 2, "mesh__tensor": 2})}
COMMON = dict(
    data__source="synthetic", data__channels=4, data__num_classes=10, train__batch_size=16, sample__batch_size=16,
    model__depth=1, model__recursion__blocks="all", model__recursion__remat="none", sample__guidance=1.5,
    model__width=WIDTH, model__heads=8, model__patch=2, model__recursion__experts=EXPERTS,
    model__recursion__experts_per_token=2, optim__b1=0.0, optim__lr=1e-3, optim__warmup_steps=0, optim__clip_norm=0.0,
)  # fmt: skip
MODELS = {
    "dit": dict(model__recursion__switch_loss_weight=0.1, model__recursion__balance_bias_rate=0.01),
    "mmdit": dict(
        model__architecture="mmdit", model__text__encoder="encoded", model__text__length=5, model__text__features=16,
        model__text__pooled_features=8,
    ),
}  # fmt: skip


class Run:
    """One model on one mesh."""

    def __init__(self, model: str, devices: int, axes: dict):
        config = tiny_config(**COMMON | MODELS[model] | axes)
        self.experiment = build(config, jax.devices()[:devices])
        self._train_step = make_train_step(self.experiment)
        self.iterator = make_iterator(
            make_condition(config).source(), config.data, seed=0, batch_size=config.train.batch_size
        )

    def train(self, state, updates: int):
        """The state after `updates` updates, and their metrics, each [updates, ...]."""
        sharding, lines = batch_sharding(self.experiment.mesh), []
        for _ in range(updates):
            batch = next(self.iterator)
            del batch["index"]
            state, metrics = self._train_step(state, jax.device_put(batch, sharding))
            lines.append(jax.tree.map(np.asarray, metrics))
        return state, {f"metric/{name}": np.stack([line[name] for line in lines]) for name in lines[0]}

    def gradient(self, state) -> dict:
        (moments,) = [part.mu for part in jax.tree.leaves(state.optimizer, is_leaf=_has_mu) if _has_mu(part)]
        return {f"gradient/{name}": np.asarray(value) for name, value in moments.items()}

    def samples(self, state) -> np.ndarray:
        null = self.experiment.condition.null
        rng = np.random.default_rng(0)

        def asked(null):
            if null.dtype.kind == "f":
                return rng.standard_normal((16, *null.shape), np.float32)
            return np.ones((16, *null.shape), null.dtype) * (np.arange(16) % 10 if null.ndim == 0 else 1)

        condition = jax.tree.map(lambda leaf: asked(np.asarray(leaf)), null)
        return np.asarray(make_sample_fn(self.experiment)(state.parameters, condition, np.arange(16)))


def dispatch_collectives(dispatch: str, owned: bool) -> list[tuple[str, str]]:
    """(shape, kind) of every collective that a gate and its experts need for their updates and the tokens' gradients.

    The batch is sharded over eight devices, with a routing group of two images on each. The weights are replicated, or
    `owned`: sharded over the expert axis.
    """
    mesh, config = (
        make_mesh(MeshConfig(fsdp=2, expert=2)),
        RecursionConfig(experts=EXPERTS, rank=RANK, dispatch=dispatch),
    )
    model = PureModel(lambda key: Pool(WIDTH, config, dtype=jnp.float32, rngs=nnx.Rngs(key)))
    capacity = expert_capacity(2 * TOKENS, config.experts, config.experts_per_token, config.capacity_factor)

    def updates_and_gradient(parameters, h, y, cotangent):
        def updates(h):
            pool = model.bind(parameters)
            assignment = assign(pool.gate(h, Conditioning(y, y), jax.random.key(0)), 2, capacity)
            return pool.experts(h, assignment, capacity)

        with models_over(mesh):
            out, transpose = jax.vjp(updates, h)
        return out, transpose(cotangent)

    def rows(*shape):
        return jax.ShapeDtypeStruct((16, *shape), jnp.float32, sharding=batch_sharding(mesh))

    def weights(name):
        spec = ["expert" if owned and axis == "expert" else None for axis in model.logical_axes[name]]
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(model.shapes[name].shape, jnp.float32, sharding=place)

    parameters = {name: weights(name) for name in model.shapes}
    arguments = (parameters, rows(TOKENS, WIDTH), rows(WIDTH), rows(TOKENS, 3, WIDTH))
    program = jax.jit(updates_and_gradient, out_shardings=batch_sharding(mesh)).lower(*arguments).compile().as_text()
    return re.findall(r"= (\S.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program)


def _has_mu(part) -> bool:
    return hasattr(part, "mu")


def main(directory: epath.Path) -> None:
    kinds = [(dispatch, owned) for dispatch in IMPLEMENTATIONS for owned in (False, True)]
    found = {
        f"{dispatch}_{'owned' if owned else 'everywhere'}": dispatch_collectives(dispatch, owned)
        for dispatch, owned in kinds
    }
    (directory / "dispatch.json").write_text(json.dumps(found))
    for model in MODELS:
        start = None
        for name, (devices, axes) in MESHES.items():
            run = Run(model, devices, axes)
            start = start or jax.tree.map(np.asarray, run.experiment.init_state())
            shardings = jax.tree.map(lambda leaf: leaf.sharding, run.experiment.abstract_state)
            state, lines = run.train(jax.device_put(start, shardings), UPDATES)
            found = lines | run.gradient(state) | {"samples": run.samples(state)}
            if model == "dit" and name == "mixed":
                with Checkpoints(directory / "checkpoints") as checkpoints:
                    checkpoints.save(UPDATES, state, run.iterator, {"updates": UPDATES})
            np.savez(directory / f"{model}_{name}.npz", **found)
            run.iterator.close()
    for name, (devices, axes) in HEIRS.items():
        run = Run("dit", devices, axes)
        with Checkpoints(directory / "checkpoints") as checkpoints:
            state, _ = checkpoints.restore(UPDATES, run.experiment.abstract_state, run.iterator)
        state, lines = run.train(state, MORE)
        np.savez(directory / f"dit_{name}_goes_on.npz", **lines | run.gradient(state))
        run.iterator.close()


if __name__ == "__main__":
    main(epath.Path(sys.argv[1]))
