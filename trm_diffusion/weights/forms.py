"""Rules between published tensors and our parameters. Each works both ways, so import and export cannot disagree."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
    """How published tensors become one of our parameters, and the exact inverse."""

    ours: Callable[..., np.ndarray]  # tensors -> parameter; ValueError if they are inconsistent
    theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # parameter -> tensors


class Rule(NamedTuple):
    ours: str  # the path of our parameter, with blocks unstacked (models.stack.per_layer)
    theirs: tuple[str, ...]  # the published tensors it is made of
    form: Form

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of the published tensors, for a parameter of `shape`."""
        return [tensor.shape for tensor in self.form.theirs(np.broadcast_to(np.int8(0), shape))]


SAME = Form(lambda x: x, lambda x: (x,))
LINEAR = Form(lambda x: x.T, lambda x: (x.T,))  # [out, in] <-> [in, out]
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: (x.transpose(3, 2, 0, 1),))  # [O, I, h, w] <-> [h, w, I, O]
POINTWISE = Form(lambda x: x[:, :, 0, 0].T, lambda x: (x.T[:, :, None, None],))  # [O, I, 1, 1] <-> [I, O]


def patches(patch: int) -> Form:
    """A convolution over patches [D, C, p, p] <-> a linear map of flattened patches [p * p * C, D]."""

    def ours(x):
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def theirs(x):
        return (x.reshape(patch, patch, -1, x.shape[1]).transpose(3, 2, 0, 1),)

    return Form(ours, theirs)


def fused(form: Form, parts: int = 3) -> Form:
    """Several published tensors, such as q, k and v, concatenated along the last axis of ours."""

    def theirs(x):
        return tuple(form.theirs(part)[0] for part in np.split(x, parts, axis=-1))

    return Form(lambda *tensors: np.concatenate([form.ours(x) for x in tensors], axis=-1), theirs)


def copies(form: Form, count: int) -> Form:
    """`count` equal published tensors, one parameter of ours."""

    def ours(first, *others):
        if any(not np.array_equal(first, other) for other in others):
            raise ValueError("they are not equal")
        return form.ours(first)

    return Form(ours, lambda x: form.theirs(x) * count)


def swapped(form: Form) -> Form:
    """The published tensor has the two halves of our last axis, such as shift and scale, in the other order."""

    def swap(x):
        return np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1)

    return Form(lambda x: swap(form.ours(x)), lambda x: form.theirs(swap(x)))


def affine(
    ours: str, *theirs: str, kernel: Form = LINEAR, change: Callable[[Form], Form] | None = None
) -> Iterator[Rule]:
    """The rules of a kernel and a bias. Several published names are fused, unless `change` says otherwise."""
    change = change or (fused if len(theirs) > 1 else lambda form: form)
    yield Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), change(kernel))
    yield Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), change(SAME))


def norm(ours: str, theirs: str) -> Iterator[Rule]:
    """The rules of a norm's scale and bias."""
    yield Rule(f"{ours}/scale", (f"{theirs}.weight",), SAME)
    yield Rule(f"{ours}/bias", (f"{theirs}.bias",), SAME)
