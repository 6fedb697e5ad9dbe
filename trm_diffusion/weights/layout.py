"""A published layout: the names of a model's tensors, and how they become our parameters."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from trm_diffusion.models.stack import StackLayout, per_layer
from trm_diffusion.weights.forms import Rule

Shapes = Mapping[str, tuple[int, ...]]
Model = dict[str, Any]  # what shapes (and a config.json) say about a model: fields of its config, and sizes


@dataclasses.dataclass(frozen=True)
class Layout:
    name: str
    kind: str  # the model: dit, mmdit, vae or inception
    signature: tuple[str, ...]  # tensors that together identify the layout
    infer: Callable[[Shapes, dict], Model]  # shapes and config.json -> the model; KeyError names a missing tensor
    shapes: Callable[[Model], Shapes]  # shapes of our parameters by path, with blocks unstacked
    rules: Callable[[Model], list[Rule]]
    config: Callable[[Model], dict] | None = None  # the config.json that the other library needs with the weights
    prefixes: tuple[str, ...] = ("",)  # possible prefixes of all names of this model; the first is written
    neighbours: tuple[str, ...] = ()  # prefixes of other models' names in the same file
    renamed: tuple[tuple[str, str], ...] = ()  # parts of names in older releases, and their current form
    # Published tensors that are not weights but follow from the model: checked if present, exported if `written`.
    constants: Callable[[Model], dict[str, np.ndarray]] = lambda model: {}
    written: bool = True
    unused: tuple[str, ...] = ()  # endings of names of tensors without effect; the manifest lists them

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """The prefix under which this layout's signature is among `names`, or None."""
        names = set(names)
        found = (prefix for prefix in self.prefixes if all(prefix + part in names for part in self.signature))
        return next(found, None)


def shapes_of(build: Callable[[Model], nnx.Module]) -> Callable[[Model], Shapes]:
    """The `shapes` of a layout, from a function that builds its model with unrolled blocks."""

    def shapes(model: Model) -> Shapes:
        flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build(model))))
        shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in flat}
        blocks = tuple((index, 1) for index in range(model.get("depth", 0)))
        return per_layer(shapes, StackLayout(blocks, (), scan=False))

    return shapes


def depth_of(shapes: Shapes, prefix: str) -> int:
    """The number of blocks `prefix`0., `prefix`1., ..."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)
