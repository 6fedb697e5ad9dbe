"""The table from logical axes to the mesh: mesh shapes, collisions, and which arrays share a sharding."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.jobs.tiny import tiny_config
from trm_diffusion.conditions import make_condition
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build, make_model
from trm_diffusion.runtime.sharding import (
    LOGICAL_TO_MESH,
    MESH_AXES,
    MeshConfig,
    batch_sharding,
    batch_shards,
    make_mesh,
    mesh_shape,
    parameter_sharding,
)

EIGHT = AbstractMesh((1, 2, 2, 2), MESH_AXES)


@pytest.mark.parametrize(("config", "devices", "shape"), [
    (MeshConfig(), 1, (1, 1, 1, 1)),
    (MeshConfig(), 8, (8, 1, 1, 1)),
    (MeshConfig(fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
    (MeshConfig(data=1, expert=4), 4, (1, 1, 1, 4)),
])  # fmt: skip
def test_mesh_shape(config, devices, shape):
    assert mesh_shape(config, devices) == shape


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU chip that JAX reads to map a mesh onto the torus."""

    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0


def test_an_axis_may_take_a_part_of_an_axis_of_the_torus():
    chips = [Chip((x, y, z)) for z in range(4) for y in range(4) for x in range(4)]
    devices = make_mesh(MeshConfig(fsdp=8), devices=chips).devices
    assert devices.shape == (8, 8, 1, 1) and set(devices.flat) == set(chips)
    for group in devices[:, :, 0, 0]:  # a compact box of eight chips
        assert np.prod(np.ptp([chip.coords for chip in group], axis=0) + 1) == 8


@pytest.mark.parametrize(("config", "devices", "slices", "divisor", "shape"), [
    (MeshConfig(fsdp=-1), 1, 1, 64, (1, 1, 1, 1)),
    (MeshConfig(fsdp=-1), 8, 1, 64, (1, 8, 1, 1)),
    (MeshConfig(fsdp=-1), 8, 1, 12, (2, 4, 1, 1)),  # as many as divide the width of 12
    (MeshConfig(fsdp=-1, tensor=2), 8, 1, 64, (1, 4, 2, 1)),
    (MeshConfig(fsdp=-1), 16, 2, 64, (2, 8, 1, 1)),  # a copy of the model in each slice
    (MeshConfig(data=4, fsdp=-1), 16, 2, 64, (4, 4, 1, 1)),
])  # fmt: skip
def test_as_many_shards_as_can_be(config, devices, slices, divisor, shape):
    assert mesh_shape(config, devices, slices=slices, divisor=divisor) == shape


def test_the_model_is_not_divided_over_slices():
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        mesh_shape(MeshConfig(data=1, fsdp=8), 8, slices=2)


@pytest.mark.parametrize(
    ("config", "devices"), [(MeshConfig(data=2), 8), (MeshConfig(fsdp=3), 8), (MeshConfig(data=16), 8)]
)
def test_a_mesh_that_does_not_fit_is_one_line(config, devices):
    with pytest.raises(UserError, match=f"mesh: data=.* does not fit {devices} devices; set config.mesh") as error:
        mesh_shape(config, devices)
    assert "\n" not in str(error.value)


def test_axes_that_collide_are_refused():
    with pytest.raises(ValueError, match="attention/out/kernel: logical axes .* collide"):
        parameter_sharding(EIGHT, "attention/out/kernel", ("heads", "mlp"))
    with pytest.raises(ValueError, match="collide"):
        parameter_sharding(EIGHT, "square", ("embed", None, "embed"))
    assert parameter_sharding(EIGHT, "free", (None, None)).spec == PartitionSpec(None, None)


def test_the_batch_is_divided_over_every_axis_but_tensor():
    assert batch_shards(EIGHT) == 4
    assert batch_sharding(EIGHT).shard_shape((16, 8, 8, 1)) == (4, 8, 8, 1)


@pytest.mark.parametrize(("scan", "pool"), [(True, "shared"), (True, "per_latent_step"), (False, "per_latent_step")])
def test_every_parameter_of_the_model_has_a_place(scan, pool):
    """The table has every axis, no two collide, and axes added by stacking layers or pools come first, unsharded."""
    config = tiny_config(model__depth=3, model__scan_blocks=scan, model__recursion__pool=pool, model__qk_norm=True)
    model = make_model(config, make_objective(config.diffusion), make_condition(config))
    divided = set()
    for name, axes in model.logical_axes.items():
        shape = model.shapes[name].shape
        assert len(axes) == len(shape) and set(axes) - {None} <= LOGICAL_TO_MESH.keys()
        sharding = parameter_sharding(EIGHT, name, axes)
        assert all(size >= 1 for size in sharding.shard_shape(shape))  # raises if it does not divide
        divided |= {axis for axis in sharding.spec if axis}
        stacked = scan * ("segments" in name) + (pool != "shared") * ("/pool/" in name)
        assert tuple(sharding.spec[:stacked]) == (None,) * stacked
        own = {"down": (None, "expert", None, "fsdp"), "up": (None, "expert", None, "tensor")}
        if "/experts/" in name:
            assert tuple(sharding.spec[stacked:]) == own[name.rsplit("/", 1)[1]]
    assert divided == {"fsdp", "tensor", "expert"}


def test_moments_and_averages_lie_where_their_parameters_do():
    experiment = build(tiny_config())
    state = experiment.abstract_state
    of_parameters = {name: leaf.sharding.spec for name, leaf in state.parameters.items()}
    adam = next(part for part in jax.tree.leaves(state.optimizer, is_leaf=_has_moments) if _has_moments(part))
    for tree in (adam.mu, adam.nu, *state.ema.values()):
        assert {name: leaf.sharding.spec for name, leaf in tree.items()} == of_parameters
    assert state.step.sharding.spec == PartitionSpec()
    assert any(any(spec) for spec in of_parameters.values())


def _has_moments(part) -> bool:
    return hasattr(part, "mu")


def test_batches_and_parameters_on_this_machines_devices():
    experiment = build(tiny_config())
    assert dict(experiment.mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1, "expert": 1}
    state = experiment.init_state()
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf.sharding, state),
        jax.tree.map(lambda leaf: leaf.sharding, experiment.abstract_state),
    )
    batch = jax.device_put(np.zeros((8, 2)), batch_sharding(experiment.mesh))
    assert len(batch.addressable_shards) == jax.device_count()
