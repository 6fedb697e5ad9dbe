"""Converts published tensors to our parameters and back by the layouts' rules: completely and exactly, or not at all.

Tensors are read only when needed and one parameter is held at a time, so that any size converts in little memory.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.weights.dit import DIFFUSERS_DIT, DIT
from trm_diffusion.weights.forms import Rule
from trm_diffusion.weights.inception import INCEPTION
from trm_diffusion.weights.layout import Layout, Model
from trm_diffusion.weights.mmdit import DIFFUSERS_SD3, SINGLE_FILE_SD3
from trm_diffusion.weights.safetensors import TensorSpec
from trm_diffusion.weights.source import PublishedWeights
from trm_diffusion.weights.vae import DIFFUSERS_VAE, SINGLE_FILE_VAE

SIT = dataclasses.replace(DIT, name="sit")  # the same tensors, trained with another objective
LAYOUTS = {
    layout.name: layout
    for layout in (DIT, SIT, DIFFUSERS_DIT, DIFFUSERS_SD3, SINGLE_FILE_SD3, DIFFUSERS_VAE, SINGLE_FILE_VAE, INCEPTION)
}
CONSTANT_TOLERANCE = {1: 0.13, 2: 4e-3, 4: 1e-5, 8: 1e-5}  # by item size of the dtype; constants are at most 1
PROBLEMS_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters by path, with blocks unstacked, read one at a time."""

    kind: str  # dit, mmdit, vae or inception
    model: Model
    specs: dict[str, TensorSpec]
    read: Callable[[str], np.ndarray]  # path -> values; UserError if they are not usable
    record: dict  # where they came from, for the manifest

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(spec.shape)) for spec in self.specs.values())

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, self.read(name)) for name in self.specs)


def detect(source: PublishedWeights, asked: str = "") -> tuple[Layout, str]:
    """The layout of a source, and the prefix of its names. Raises UserError if none or several fit."""
    candidates = [LAYOUTS[asked]] if asked else [layout for layout in LAYOUTS.values() if layout is not SIT]
    found = {layout.name: layout.prefix_in(source.tensors) for layout in candidates}
    fitting = [name for name, prefix in found.items() if prefix is not None]
    if not fitting:
        first = ", ".join(sorted(source.tensors)[:2]) or "none"
        wanted = f"{asked}, which has {', '.join(LAYOUTS[asked].signature)}" if asked else ", ".join(LAYOUTS)
        raise UserError(
            f"{source.name} is not in the layout {wanted}; its {len(source.tensors)} tensors begin with {first}"
        )
    if len(fitting) > 1:
        raise UserError(
            f"{source.name} holds more than one model; choose with --layout={' or --layout='.join(fitting)}"
        )
    return LAYOUTS[fitting[0]], found[fitting[0]]


def to_ours(source: PublishedWeights, layout: str = "") -> Weights:
    """The source's tensors as our parameters, in the source's dtypes.

    Raises UserError that lists missing, unexpected and misshapen tensors. A tensor with non-finite values is refused
    when it is read.
    """
    form, prefix = detect(source, layout)
    tensors, problems = _named(source, form, prefix)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        model = form.infer(shapes, source.config)
    except KeyError as error:
        raise UserError(f"{source.name}: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:
        raise UserError(f"{source.name}: its shapes are not those of the layout {form.name} ({error})") from None
    rules, ours = form.rules(model), form.shapes(model)
    known = set(form.constants(model))
    for rule in rules:
        known.update(rule.theirs)
        for name, shape in zip(rule.theirs, rule.shapes(ours[rule.ours]), strict=True):
            if name not in tensors:
                problems.append(f"{name} is missing")
            elif tensors[name].shape != shape:
                problems.append(f"{name} has shape {tensors[name].shape}, not {shape}")
    problems += [f"{name} is unexpected" for name in tensors if name not in known]
    for name, constant in form.constants(model).items():
        if name in tensors and not problems:
            problems += _wrong_constant(name, tensors[name], constant)
    refuse(source.name, problems)
    specs = {
        rule.ours: TensorSpec(ours[rule.ours], np.result_type(*[tensors[name].dtype for name in rule.theirs]))
        for rule in rules
    }
    by_name = {rule.ours: rule for rule in rules}

    def read(name: str) -> np.ndarray:
        return _ours(by_name[name], tensors, specs[name].dtype, source.name)

    record = {"layout": form.name} | source.record()
    if form.unused:
        record["unused"] = [name for name in source.tensors if name.endswith(form.unused)]
    return Weights(form.kind, model, specs, read, record)


def _named(source: PublishedWeights, layout: Layout, prefix: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The layout's tensors by their current names, without prefix; and the problems with other tensors."""
    tensors, problems = {}, []
    for name, tensor in source.tensors.items():
        if not name.startswith(prefix):
            if not name.startswith(layout.neighbours):
                problems.append(f"{name} is unexpected")
            continue
        if name.endswith(layout.unused):
            continue
        name = name.removeprefix(prefix)
        if not prefix and name.startswith(layout.neighbours):
            continue
        for old, new in layout.renamed:
            name = name.replace(old, new)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} holds {tensor.dtype}, which are not weights")
        tensors[name] = tensor
    return tensors, problems


def _wrong_constant(name: str, tensor: np.ndarray, constant: np.ndarray) -> list[str]:
    if tensor.shape != constant.shape:
        return [f"{name} has shape {tensor.shape}, not {constant.shape}"]
    difference = np.max(np.abs(tensor.astype(np.float32) - constant))
    if difference <= CONSTANT_TOLERANCE[tensor.dtype.itemsize]:
        return []
    return [f"{name} is not the table that this model computes (they differ by {difference:.2g})"]


def _ours(rule: Rule, tensors: dict[str, np.ndarray], dtype: np.dtype, where: str) -> np.ndarray:
    parts = [tensors[name] for name in rule.theirs]
    for name, part in zip(rule.theirs, parts, strict=True):
        if not np.isfinite(part).all():
            raise UserError(f"{where}: {name} holds values that are not finite")
    try:
        return rule.form.ours(*parts).astype(dtype, copy=False)
    except ValueError as error:
        raise UserError(f"{where}: {rule.theirs[0]} and {len(parts) - 1} others: {error}") from None


def in_dtype(weights: Weights, dtype: str, where: str) -> Weights:
    """The same weights in another dtype. Reading a value that does not fit in it raises UserError."""

    def read(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            value = weights.read(name).astype(dtype)
        if not np.isfinite(value).all():
            raise UserError(f"{where}: {name} holds values beyond {dtype}; choose another --dtype")
        return value

    specs = {name: TensorSpec(spec.shape, np.dtype(dtype)) for name, spec in weights.specs.items()}
    return dataclasses.replace(weights, specs=specs, read=read)


def to_theirs(
    weights: Weights, name: str, where: str
) -> tuple[dict[str, TensorSpec], Iterator[tuple[str, np.ndarray]]]:
    """Our parameters as a published layout's tensors: their specs, and the tensors in that order.

    Raises UserError if the layout belongs to another kind of model, or has no place for a parameter.
    """
    layout = LAYOUTS[name]
    if weights.kind != layout.kind:
        raise UserError(f"{where} holds a {weights.kind}; the layout {name} is for a {layout.kind}")
    rules = layout.rules(weights.model)
    prefix = layout.prefixes[0]
    placed = {rule.ours for rule in rules}
    problems = [f"{name} is missing" for name in placed - weights.specs.keys()]
    problems += [
        f"{parameter} has no place in the layout {name}" for parameter in weights.specs if parameter not in placed
    ]
    if (weights.model.get("recursion") or {}).get("looped"):
        problems.append(f"the loop of config.model.recursion.looped has no place in the layout {name}")
    refuse(where, sorted(problems))
    constants = layout.constants(weights.model) if layout.written else {}
    dtype = max({spec.dtype for spec in weights.specs.values()}, key=lambda dtype: dtype.itemsize)
    specs = {prefix + key: TensorSpec(value.shape, dtype) for key, value in constants.items()}
    for rule in rules:
        spec = weights.specs[rule.ours]
        specs |= {
            prefix + n: TensorSpec(s, spec.dtype) for n, s in zip(rule.theirs, rule.shapes(spec.shape), strict=True)
        }

    def tensors():
        for key, value in constants.items():
            yield prefix + key, value.astype(dtype)
        for rule in rules:
            yield from zip((prefix + n for n in rule.theirs), rule.form.theirs(weights.read(rule.ours)), strict=True)

    return specs, tensors()


def refuse(where: str, problems: list[str]) -> None:
    """Raises UserError with one line if there are problems."""
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise UserError(f"{where}: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}")
