"""The device mesh, and the one table that maps logical axes of parameters and activations to mesh axes.

With fsdp, parameters are stored in shards and gathered for each block as it runs, and their gradients are summed into
shards. Activations stay sharded over "batch". Without constraints the compiler may shard activations like the
parameters and keep the whole batch on every device, which costs many times the memory.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trm_diffusion.errors import UserError
from trm_diffusion.models.partition import placed
from trm_diffusion.models.settings import Settings, setting

MESH_AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is sharded over all of these
LOGICAL_TO_MESH = {
    "batch": BATCH_AXES,  # for activations; the others are for parameters, "heads" for both
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "rank": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    # copies of the model, a multiple of the pod slices; -1 uses the devices that the other axes leave
    data: int = setting(-1, also=(-1,), least=1)
    # shards of parameters, optimiser state and batch; -1 uses as many as a slice and the model width allow
    fsdp: int = setting(1, also=(-1,), least=1)
    tensor: int = setting(1, least=1)  # shards of heads and of the MLP's hidden width
    expert: int = setting(1, least=1)  # shards of the experts


def mesh_shape(config: MeshConfig, devices: int, *, slices: int = 1, divisor: int = 1) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` for this total number of devices. Raises UserError if they do not fit.

    slices: groups of devices with slower links between groups than within; only copies of the model (`data`) span
    several slices. divisor: the model width, which fsdp = -1 must divide.
    """
    sizes = dict(dataclasses.asdict(config))
    if sizes["fsdp"] == -1:
        others = sizes["tensor"] * sizes["expert"] * max(sizes["data"] // slices, 1)
        sizes["fsdp"] = math.gcd(devices // slices // others, divisor)
    known = math.prod(size for size in sizes.values() if size > 0)
    if sizes["data"] == -1 and devices % known == 0:
        sizes["data"] = devices // known
    if sizes["data"] == -1 or math.prod(sizes.values()) != devices:
        wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"mesh: {wanted} does not fit {devices} devices; set config.mesh to sizes with this product")
    if sizes["data"] % slices:
        raise UserError(f"mesh: data={sizes['data']} does not divide over {slices} slices; make it a multiple of them")
    return tuple(sizes[axis] for axis in MESH_AXES)


def make_mesh(config: MeshConfig, *, divisor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all) with axes `MESH_AXES`; see `mesh_shape`.

    Each slice of a TPU pod holds whole copies of the model: `data` runs through one slice before the next.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({slice_of(device) for device in devices})
    shape = mesh_shape(config, len(devices), slices=slices, divisor=divisor)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:  # fsdp=8 on a 4x4x4 torus takes one of its axes and half of another
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = (shape[0] // slices, *shape[1:])
        over = (slices,) + (1,) * (len(shape) - 1)
        array = mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=types)


def slice_of(device: jax.Device) -> int:
    """The index of the device's TPU pod slice; 0 for other platforms."""
    return (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Rows of a global batch on this process's devices, in increasing order; processes may share rows."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.concatenate([np.arange(*rows) for rows in sorted({part.indices(batch_size) for (part,) in slices})])


def global_batch(sharding: NamedSharding, values: np.ndarray, batch_size: int) -> jax.Array:
    """The global batch, assembled from the `own_rows` of each process."""
    return jax.make_array_from_process_local_data(sharding, values, (batch_size, *values.shape[1:]))


def own_shards(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(rows [R], values [R, ...]) of a global batch assigned to this process; each row has exactly one process."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if not shards:
        return np.arange(0), np.zeros((0, *array.shape[1:]), array.dtype)
    rows = [np.arange(*shard.index[0].indices(array.shape[0])) for shard in shards]
    return np.concatenate(rows), np.concatenate([np.asarray(shard.data) for shard in shards])


def distribute(values, sharding: NamedSharding):
    """Turns a tree of arrays that every process holds in full into global arrays."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]), values
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def models_over(mesh: Mesh):
    """A context in which traced models are sharded over the mesh."""
    return placed(mesh, LOGICAL_TO_MESH)


def parameter_sharding(mesh: Mesh, name: str, logical_axes: tuple[str | None, ...]) -> NamedSharding:
    """The sharding of a parameter. Raises ValueError if two of its axes map to the same mesh axis."""
    spec = [None if axis is None else LOGICAL_TO_MESH[axis] for axis in logical_axes]
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"{name}: logical axes {logical_axes} collide on the mesh as {spec}")
    return NamedSharding(mesh, PartitionSpec(*spec))
