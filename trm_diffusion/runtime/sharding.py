"""The device mesh, and the one table that lays the models' logical axes over it."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trm_diffusion.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is divided over all of these
LOGICAL_TO_MESH = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "expert": "expert", "rank": None}


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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over these devices, all of them by default, with axes `MESH_AXES`."""
    shape = mesh_shape(config, len(devices or jax.devices()))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is divided."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices hold, rising; processes may share rows."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.concatenate([np.arange(*rows) for rows in sorted({part.indices(batch_size) for (part,) in slices})])


def global_batch(sharding: NamedSharding, values: np.ndarray, batch_size: int) -> jax.Array:
    """The batch of which each process gives its `own_rows`."""
    return jax.make_array_from_process_local_data(sharding, values, (batch_size, *values.shape[1:]))


def own_shards(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(rows [R], their values [R, ...]) of a global batch that fall to this process; each row falls to one alone."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if not shards:
        return np.arange(0), np.zeros((0, *array.shape[1:]), array.dtype)
    rows = [np.arange(*shard.index[0].indices(array.shape[0])) for shard in shards]
    return np.concatenate(rows), np.concatenate([np.asarray(shard.data) for shard in shards])


def distribute(values, sharding: NamedSharding):
    """A tree of arrays that every process holds whole, as global arrays."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]), values
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, name: str, logical_axes: tuple[str | None, ...]) -> NamedSharding:
    """Where a parameter lives. Raises ValueError if two of its axes would fall on one mesh axis."""
    spec = [None if axis is None else LOGICAL_TO_MESH[axis] for axis in logical_axes]
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"{name}: logical axes {logical_axes} collide on the mesh as {spec}")
    return NamedSharding(mesh, PartitionSpec(*spec))
