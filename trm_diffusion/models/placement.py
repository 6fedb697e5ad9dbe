"""Kernels on several devices: each device runs a kernel on its own share of the activations.

The compiler divides a program over devices by itself, but not inside a kernel. A job therefore opens `placed` around
its calls of a model, and a model runs its kernels by `on_each_device`, which speaks of logical axes alone. Outside of
`placed` there is one device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

_PLACEMENT = contextvars.ContextVar("placement", default=None)  # (mesh, logical axis -> mesh axes) or None


@contextlib.contextmanager
def placed(mesh: Mesh, axes: Mapping[str, str | Sequence[str] | None]):
    """Models traced inside run over `mesh`, their logical axes divided over the mesh axes that `axes` gives each."""
    token = _PLACEMENT.set((mesh, axes))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def on_each_device(function: Callable, *operands: tuple[jax.Array, tuple[str | None, ...]]) -> jax.Array:
    """function(*arrays) on each device's share of the arrays; the result is divided as the first of them.

    operands: (array, its logical axes) each. What is named None, or does not divide evenly, every device gets whole.
    """
    arrays = [array for array, _ in operands]
    if _PLACEMENT.get() is None or _PLACEMENT.get()[0].size == 1:
        return function(*arrays)
    mesh, axes = _PLACEMENT.get()

    def share(size: int, name: str | None) -> str | tuple[str, ...] | None:
        over = axes.get(name) or ()
        shards = math.prod(mesh.shape[axis] for axis in ([over] if isinstance(over, str) else over))
        return over if shards > 1 and size % shards == 0 else None

    specs = tuple(PartitionSpec(*map(share, array.shape, names)) for array, names in operands)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
