"""FLOPs of a program's matrix multiplications and convolutions, with every iteration of a loop counted."""

from collections.abc import Callable

import jax
import numpy as np


class UnknownTurns(ValueError):
    """A loop whose trip count is not known before it runs."""


def forward_flops(function: Callable, *arguments) -> int:
    """Floating-point operations (two per multiply-add) of `function` in matrix products and convolutions.

    arguments: arrays or shapes. A scan counts every iteration, a cond its most expensive branch. Raises UnknownTurns.
    """
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    return _flops(jitted.trace(*arguments).jaxpr.jaxpr)


def _flops(jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * _size(equation.outvars[0]) * int(np.prod([shape[axis] for axis in contracted]))
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        output_axis = parameters["dimension_numbers"].rhs_spec[0]
        return 2 * _size(equation.outvars[0]) * int(np.prod(kernel)) // kernel[output_axis]
    inner = [_flops(getattr(value, "jaxpr", value)) for value in _programs(parameters)]
    if name == "while" and any(inner):
        raise UnknownTurns("the trip count of a while loop is not known before it runs")
    if name == "cond":
        return max(inner)
    return sum(inner) * (parameters["length"] if name == "scan" else 1)


def _programs(parameters: dict) -> list:
    """The jaxprs in an equation's parameters; for a custom derivative only the function itself."""
    found = []
    for name, value in parameters.items():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(entry, "jaxpr", entry), "eqns") and not name.startswith(("fwd", "bwd")):
                found.append(entry)
    return found


def _size(variable) -> int:
    return int(np.prod(variable.aval.shape))
