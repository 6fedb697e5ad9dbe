"""Sharding of activations: a model names their axes, and the job that traces it maps the names to mesh axes.

The compiler partitions a program by itself, but it may shard activations badly, and it cannot look inside a kernel. So
a model constrains its activations where it matters, and runs its kernels on each device's shard. Outside `placed`, as
on one device or in a debugger, neither has any effect.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]  # the logical name of each axis of an array
_PLACEMENT = contextvars.ContextVar("placement", default=None)  # (mesh, logical axis -> mesh axes) or None


@contextlib.contextmanager
def placed(mesh: Mesh, axes: Mapping[str, str | Sequence[str] | None]) -> Iterator[None]:
    """Models traced inside run on `mesh`; `axes` gives the mesh axes over which each logical axis is sharded."""
    token = _PLACEMENT.set((mesh, axes))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def lay(x: jax.Array, *names: str | None) -> jax.Array:
    """x, sharded by the logical names of its leading axes (None: not sharded)."""
    if _PLACEMENT.get() is None:
        return x
    mesh, axes = _PLACEMENT.get()
    spec = PartitionSpec(*(None if name is None else axes[name] for name in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def platform() -> str:
    """Platform of the devices that the program is traced for: "tpu", "gpu" or "cpu"."""
    placement = _PLACEMENT.get()
    return jax.default_backend() if placement is None else placement[0].devices.flat[0].platform


def on_each_device(function: Callable, *operands: tuple[jax.Array, Axes], results: Sequence[Axes] = ()):
    """Runs function(*arrays) on each device's shard of the arrays.

    operands: pairs of an array and its logical axes. results: the logical axes of each array that the function returns;
    without them it returns one array, sharded like the first operand. An axis that is named None, or does not divide
    evenly, is whole on every device.
    """
    arrays = [array for array, _ in operands]
    if _PLACEMENT.get() is None or _PLACEMENT.get()[0].size == 1:
        return function(*arrays)
    mesh, axes = _PLACEMENT.get()

    def share(size: int, name: str | None) -> str | tuple[str, ...] | None:
        over = axes.get(name) or ()
        shards = math.prod(mesh.shape[axis] for axis in ([over] if isinstance(over, str) else over))
        return over if shards > 1 and size % shards == 0 else None

    def spec(array, names: Axes) -> PartitionSpec:
        return PartitionSpec(*map(share, array.shape, names))

    specs = tuple(spec(array, names) for array, names in operands)
    given = specs[0]
    if results:
        given = tuple(map(spec, jax.eval_shape(function, *arrays), results))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=given, check_vma=False)(*arrays)
