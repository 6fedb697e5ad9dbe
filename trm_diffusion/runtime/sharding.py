"""The device mesh, and the one table that lays the models' logical axes over it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trm_diffusion.errors import UserError
from trm_diffusion.models.placement import placed

MESH_AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is divided over all of these
LOGICAL_TO_MESH = {
    "batch": BATCH_AXES,  # of activations; the others are of parameters, and heads of both
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "rank": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # copies of the model; -1 takes the devices the other axes leave
    fsdp: int = 1  # shards of parameters and optimiser state; the batch is divided over them too
    tensor: int = 1  # shards of heads and of the MLP's hidden width
    expert: int = 1  # shards of the experts


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` for this many devices. Raises UserError where they do not fit."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = int(np.prod([size for size in sizes if size > 0]))
    if sizes[0] == -1 and devices % known == 0:
        sizes[0] = devices // known
    if sizes[0] == -1 or int(np.prod(sizes)) != devices:
        wanted = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh: {wanted} does not fit {devices} devices; set config.mesh so that the product does")
    return tuple(sizes)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices, with axes `MESH_AXES`."""
    shape = mesh_shape(config, jax.device_count())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is divided."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def models_over(mesh: Mesh):
    """A context: the models traced in it run over the mesh."""
    return placed(mesh, LOGICAL_TO_MESH)


def parameter_sharding(mesh: Mesh, name: str, logical_axes: tuple[str | None, ...]) -> NamedSharding:
    """Where a parameter lives. Raises ValueError if two of its axes would fall on one mesh axis."""
    spec = [None if axis is None else LOGICAL_TO_MESH[axis] for axis in logical_axes]
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"{name}: logical axes {logical_axes} collide on the mesh as {spec}")
    return NamedSharding(mesh, PartitionSpec(*spec))
