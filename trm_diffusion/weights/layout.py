"""A published layout: which tensors a model has under which names, and how they become ours."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from trm_diffusion.models.stack import StackLayout, per_layer
from trm_diffusion.weights.forms import Rule

Shapes = Mapping[str, tuple[int, ...]]
Model = dict[str, Any]  # what shapes (and a config.json) tell of a model: fields of its config, and its sizes


@dataclasses.dataclass(frozen=True)
class Layout:
    name: str
    kind: str  # the model: dit, mmdit, vae or inception
    signature: tuple[str, ...]  # tensors that no other layout has together
    infer: Callable[[Shapes, dict], Model]  # shapes and config.json -> the model; KeyError names a missing tensor
    shapes: Callable[[Model], Shapes]  # of our parameters by path, each block on its own
    rules: Callable[[Model], list[Rule]]
    config: Callable[[Model], dict] | None = None  # the config.json that the other library wants beside the weights
    prefixes: tuple[str, ...] = ("",)  # what may lead every name of this model in a file; the first is written
    neighbours: tuple[str, ...] = ()  # what leads the names of other models in the same file
    renamed: tuple[tuple[str, str], ...] = ()  # parts of names as older releases had them, and as they are now
    # Tensors there that are no weights but follow from the model: checked where present, and `written` or not.
    constants: Callable[[Model], dict[str, np.ndarray]] = lambda model: {}
    written: bool = True
    unused: tuple[str, ...] = ()  # how names end of what is no weight and changes nothing; the manifest lists them

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """The prefix under which this layout's signature is among `names`, or None."""
        names = set(names)
        found = (prefix for prefix in self.prefixes if all(prefix + part in names for part in self.signature))
        return next(found, None)


def shapes_of(build: Callable[[Model], nnx.Module]) -> Callable[[Model], Shapes]:
    """The `shapes` of a layout, from what builds its model with its blocks unrolled."""

    def shapes(model: Model) -> Shapes:
        flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build(model))))
        shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in flat}
        blocks = tuple((index, 1) for index in range(model.get("depth", 0)))
        return per_layer(shapes, StackLayout(blocks, (), scan=False))

    return shapes


def depth_of(shapes: Shapes, prefix: str) -> int:
    """How many blocks `prefix`0., `prefix`1., ... there are."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1)
