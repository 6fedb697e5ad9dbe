"""Converts a ConfigDict to a validated `Config`, and back.

Experiments under configs/ start from `default_config()` and change fields. Every mistake raises a one-line `UserError`
before any device is touched.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator

import ml_collections
from ml_collections import config_dict

from trm_diffusion.config import rules
from trm_diffusion.config.schema import Config
from trm_diffusion.errors import UserError
from trm_diffusion.readers.paths import expand


def default_config() -> ml_collections.ConfigDict:
    """A ConfigDict with every field at its default, for an experiment file to change."""
    return _to_config_dict(Config)


def _to_config_dict(cls) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            result[field.name] = _to_config_dict(hints[field.name])
        elif field.default is None:
            result[field.name] = config_dict.placeholder(_plain_type(hints[field.name]))
        else:
            result[field.name] = field.default
    return result


def _plain_type(hint) -> type:
    """The type without `None`: int for `int` and for `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Converts a ConfigDict to a validated `Config`. Raises a one-line UserError for any mistake."""
    resolved = _build(Config, config, "config")
    rules.check(resolved)
    return resolved


def _build(cls, values, where: str):
    hints = typing.get_type_hints(cls)
    paths = {field.name for field in dataclasses.fields(cls) if field.metadata.get("path")}
    fields = {}
    for name in values:
        path = f"{where}.{name}"
        if name not in hints:
            raise unknown_field(path)
        if not dataclasses.is_dataclass(hints[name]):
            value = _typed(values[name], hints[name], path)
            fields[name] = expand(value, path) if name in paths else value
        elif isinstance(values[name], ml_collections.ConfigDict | dict):
            fields[name] = _build(hints[name], values[name], path)
        else:
            raise UserError(f"{path} is a group of fields, not {values[name]!r}")
    try:
        return cls(**fields)
    except ValueError as error:  # one field, or two fields of this group; the message begins with the field's name
        raise UserError(f"{where}.{error}") from None


def _typed(value, hint, path: str):
    """The value in the field's type. Converts an int to a float and a list to a tuple, and refuses any other type."""
    wanted = _plain_type(hint)
    if value is None and wanted is not hint:
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple and isinstance(value, list | tuple):
        if any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in value):
            raise UserError(f"{path} takes numbers separated by commas, not {value!r}")
        return tuple(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{path} takes a {wanted.__name__}, not {value!r}")
    return value


def fields_of(cls=Config, where: str = "config") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields every field with its path, such as "config.optim.lr"; a group comes before its fields."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield f"{where}.{field.name}", field
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name], f"{where}.{field.name}")


def field_exists(path: str) -> bool:
    """Whether a path, such as "config.optim.lr", names a field."""
    return any(path == known for known, _ in fields_of())


def unknown_field(path: str) -> UserError:
    """The error for a field that does not exist; suggests ml_collections' near name or same-named fields elsewhere."""
    group = default_config()
    where = "config"
    names = path.split(".")[1:]
    for depth, name in enumerate(names):
        if not isinstance(group, ml_collections.ConfigDict):
            return UserError(f"{path} is not a field; {where} is one and has no fields of its own")
        try:
            group, where = group[name], f"{where}.{name}"
        except KeyError as error:
            near = re.findall('Did you mean "(.+?)"', str(error))
            guess = ".".join((where, *near, *names[depth + 1 :]))
            namesakes = [known for known, _ in fields_of() if known.endswith(f".{names[-1]}")]
            guesses = namesakes if not near else [guess if field_exists(guess) else f"{where}.{near[0]}"]
            hint = f"did you mean {' or '.join(guesses)}?" if guesses else f"{where} has {', '.join(group)}"
            return UserError(f"{path} is not a field; {hint}")
    raise ValueError(f"{path} is a field")


def variant(argument: str | None, **defaults: str) -> dict[str, str]:
    """Parses a config file's argument, such as "model=S/2,recursion=off"; options it omits keep their defaults."""
    options = dict(defaults)
    for part in filter(None, (argument or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            known = ", ".join(f"{key}={value}" for key, value in defaults.items())
            raise UserError(f'config argument "{part}" is not an option of this file; it has {known}')
        options[name] = value
    return options


def to_dict(config: Config) -> dict:
    """The config as nested dictionaries of plain values, for JSON."""
    return dataclasses.asdict(config)
