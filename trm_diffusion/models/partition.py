"""Where activations lie on the devices: a model names their axes, and the job that traces it says what the names mean.

Without a word from the job, as on one device or for a debugger, nothing is laid anywhere.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_LAYOUT: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out_by(layout: Callable[[jax.Array, tuple], jax.Array]) -> Iterator[None]:
    """Models traced in here have their activations laid by `layout(x, logical axes) -> x`."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def lay(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, whose leading axes have these logical names (None: divided over nothing), where the job wants it."""
    layout = _LAYOUT.get()
    return x if layout is None else layout(x, axes)
