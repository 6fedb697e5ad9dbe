"""A Flax NNX model as a pure function of its parameters, a flat dictionary from path to array.

Paths are strings such as "stack/segments/0/blocks/attention/qkv/kernel". Masks, patterns, logs and checkpoints all use
these names, and a plain dictionary does not depend on library versions.
"""

import fnmatch
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from trm_diffusion.files import sha256_of_arrays

Parameters = dict[str, jax.Array]


class PureModel:
    """Holds a model's structure without its values.

    build: PRNG key -> nnx module.
    """

    def __init__(self, build: Callable[[jax.Array], nnx.Module]):
        self._build = build
        self._graphdef, state = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
        flat = nnx.to_flat_state(state)
        self._paths = {"/".join(map(str, path)): path for path, _ in flat}
        self.shapes = {
            "/".join(map(str, path)): jax.ShapeDtypeStruct(variable.shape, variable.dtype) for path, variable in flat
        }
        self.logical_axes = {
            "/".join(map(str, path)): _stacked(
                variable.get_metadata().get("logical_axes", (None,) * len(variable.shape)),
                len(variable.shape),
            )
            for path, variable in flat
        }

    def init(self, key: jax.Array) -> Parameters:
        """Initial parameters. Can be jitted, so that each device creates only its own shard."""
        return {
            "/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(self._build(key)))
        }

    def bind(self, parameters: Parameters) -> nnx.Module:
        """The module with these values; `parameters` must have exactly the model's paths."""
        return nnx.merge(
            self._graphdef,
            nnx.from_flat_state({self._paths[name]: value for name, value in parameters.items()}),
        )


def _stacked(axes: tuple, ndim: int) -> tuple:
    """The logical axes of a parameter, with None for any leading axes added by stacking layers or pools."""
    return (None,) * (ndim - len(axes)) + tuple(axes)


def trainable_names(names, trainable: str) -> list[str]:
    """The names of the trainable parameters, in the order of `names`.

    trainable: "all", "recursion" (gates and experts), or comma-separated path patterns. Selection biases are never
    trainable: loss-free balancing updates them by its own rule.
    """
    patterns = {"all": ["*"], "recursion": ["*/recursion/*"]}.get(trainable, trainable.split(","))
    return [
        name
        for name in names
        if not is_balance_bias(name) and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


def is_balance_bias(name: str) -> bool:
    """Whether this is the selection bias of a gate (models/recursion/gate.py)."""
    return name.endswith("/balance_bias")


def memory(arrays) -> int:
    """Bytes of a tree of global arrays or shapes; replicas are not counted."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def device_bytes(arrays) -> int:
    """Bytes on each device of a tree of arrays, or of shapes with a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )


def count(parameters) -> int:
    """Number of scalars in a dictionary of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


def parameters_sha256(parameters: Parameters) -> str:
    """A hash of names, dtypes, shapes and values. Every process of the run takes part.

    It fetches one parameter after another to the host: seconds per GB.
    """

    def fetched(leaf) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return sha256_of_arrays(
        (f"{name} {leaf.dtype} {leaf.shape}", fetched(leaf)) for name, leaf in sorted(parameters.items())
    )
