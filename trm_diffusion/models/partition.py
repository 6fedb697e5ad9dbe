"""Where activations lie on the devices: a model names their axes, and the job that traces it says what the names mean.

The compiler divides a program over devices by itself, but it may divide activations badly, and it cannot look inside a
kernel: so a model lays its activations where it matters, and runs its kernels on each device's share. Outside of
`placed`, as on one device or in a debugger, neither does anything.
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
    """Models traced inside run over `mesh`, their logical axes divided over the mesh axes that `axes` gives each."""
    token = _PLACEMENT.set((mesh, axes))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def lay(x: jax.Array, *names: str | None) -> jax.Array:
    """x, whose leading axes have these logical names (None: divided over nothing)."""
    if _PLACEMENT.get() is None:
        return x
    mesh, axes = _PLACEMENT.get()
    spec = PartitionSpec(*(None if name is None else axes[name] for name in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def platform() -> str:
    """Of the devices that the program is traced for: "tpu", "gpu", "cpu"."""
    placement = _PLACEMENT.get()
    return jax.default_backend() if placement is None else placement[0].devices.flat[0].platform


def on_each_device(function: Callable, *operands: tuple[jax.Array, Axes], results: Sequence[Axes] = ()):
    """function(*arrays) on each device's share of the arrays.

    operands: (array, its logical axes) each. results: the axes of each array that the function gives; without them it
    gives one, which is divided as the first operand. What is named None, or does not divide evenly, every device gets
    whole.
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
