"""From a ConfigDict to a checked `Config`, and back.

Experiments under configs/ start from `default_config()` and change fields; every mistake ends in one line (`UserError`)
before any device is touched.
"""

import dataclasses
import difflib
import types
import typing

import ml_collections
from ml_collections import config_dict

from trm_diffusion.config.rules import check
from trm_diffusion.config.schema import Config
from trm_diffusion.errors import UserError


def default_config() -> ml_collections.ConfigDict:
    """A ConfigDict with every field at its default, for an experiment file to change."""
    return _to_config_dict(Config)


def _to_config_dict(cls) -> ml_collections.ConfigDict:
    result, hints = ml_collections.ConfigDict(), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            result[field.name] = _to_config_dict(hints[field.name])
        elif field.default is None:
            result[field.name] = config_dict.placeholder(_plain_type(hints[field.name]))
        else:
            result[field.name] = field.default
    return result


def _plain_type(hint) -> type:
    """int for `int`, and for `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def resolve(config: ml_collections.ConfigDict) -> Config:
    """ConfigDict -> validated `Config`. Raises UserError with one line for any mistake."""
    resolved = _build(Config, config, "config")
    check(resolved)
    return resolved


def _build(cls, values, where: str):
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise unknown_field(f"{where}.{name}")
    fields = {}
    for name in values:
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(values[name], ml_collections.ConfigDict | dict):
                raise UserError(f"{where}.{name} is a group of fields, not {values[name]!r}")
            fields[name] = _build(hints[name], values[name], f"{where}.{name}")
        else:
            fields[name] = _typed(values[name], hints[name], f"{where}.{name}")
    try:
        return cls(**fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _typed(value, hint, where: str):
    """The value as the field's type; an int passes for a float and a list for a tuple, nothing else does."""
    wanted = _plain_type(hint)
    if value is None and wanted is not hint:
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple and isinstance(value, list | tuple):
        if any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in value):
            raise UserError(f"{where} takes numbers separated by commas, not {value!r}")
        return tuple(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{where} takes a {wanted.__name__}, not {value!r}")
    return value


def unknown_field(path: str) -> UserError:
    """The error for a field that does not exist, with the nearest that does."""
    known = list(_field_paths(Config, "config"))
    group, _, leaf = path.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    near = (
        difflib.get_close_matches(path, siblings, n=1, cutoff=0.85)
        or [name for name in known if name.rpartition(".")[2] == leaf]
        or difflib.get_close_matches(path, known, n=1, cutoff=0.0)
    )
    return UserError(f"{path} is not a field; did you mean {near[0]}?")


def field_exists(path: str) -> bool:
    """Is "config.optim.lr" a field?"""
    return path in _field_paths(Config, "config")


def _field_paths(cls, where: str):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{where}.{field.name}"
        yield path
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _field_paths(hints[field.name], path)


def variant(argument: str | None, **defaults: str) -> dict[str, str]:
    """The options of a config file's argument, "model=S/2,recursion=off", over their defaults."""
    options = dict(defaults)
    for part in filter(None, (argument or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            known = ", ".join(f"{key}={value}" for key, value in defaults.items())
            raise UserError(f'config argument "{part}" is not one of this file\'s options, which are {known}')
        options[name] = value
    return options


def to_dict(config: Config) -> dict:
    """Plain nested dictionaries and lists, for JSON."""
    return dataclasses.asdict(config)
