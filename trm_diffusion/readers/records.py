"""JSON files, and files with one JSON object per line: read, parsed and checked against the form that is expected.

A form is a type (`str`, `int`, `float`, which takes whole numbers too, `int | None`, `object` for anything), `[form]`
for a list of these, `(form, form)` for a list of exactly these, `{"name": form}` for an object with at least these
fields (`"name?"` may be absent), or `{str: form}` for an object with any names.
"""

import json
import os
import re
import reprlib
import types
import typing
from typing import Any

from trm_diffusion.errors import UserError
from trm_diffusion.readers.paths import PathLike
from trm_diffusion.readers.text import read_lines, read_text

NAMES = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
    types.NoneType: "null",
}  # fmt: skip
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair, or a whole pair


def read_json(path: PathLike, form: Any = dict, remedy: str = "") -> Any:
    """The value in a JSON file. Raises UserError, which ends with `remedy`, if it is no JSON or of another form."""
    return parse(read_text(path), form, os.fspath(path), remedy)


def read_json_lines(path: PathLike, form: Any = dict, remedy: str = "") -> list[tuple[str, Any]]:
    """Where each line is ("FILE, line 3"), for errors, and its value; at least one. Empty lines are skipped."""
    lines = enumerate(read_lines(path), start=1)
    places = [(f"{os.fspath(path)}, line {number}", line) for number, line in lines if line.strip()]
    records = [(where, parse(line, form, where, remedy)) for where, line in places]
    if not records:
        raise _error(f"{os.fspath(path)} holds no records", remedy)
    return records


def parse(text: str, form: Any, where: str, remedy: str = "") -> Any:
    """The value that a JSON text holds, of the form. where: names the text in errors."""
    try:
        value = json.loads(text)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _error(f"{where}: half of a surrogate pair, which is no character", remedy) from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise _error(f"{where}{line}: not JSON ({error.msg}); is the file cut off?", remedy) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise _error(f"{where}: not JSON that can be read ({type(error).__name__})", remedy) from None
    check(value, form, where, remedy)
    return value


def check(value: Any, form: Any, where: str, remedy: str = "") -> None:
    """Raises UserError, which names the entry, unless a value is of the form."""
    problem = _problem(value, form, "")
    if problem:
        raise _error(f"{where}: {problem}", remedy)


def build(cls: type, value: Any, where: str, remedy: str = "") -> Any:
    """The dataclass whose fields an object holds. Raises UserError for a missing, unknown or mistyped one."""
    form = typing.get_type_hints(cls)
    check(value, form, where, remedy)
    unknown = sorted(value.keys() - form.keys())
    if unknown:
        raise _error(f"{where}: {unknown[0]} is not one of {', '.join(form)}", remedy)
    try:
        return cls(**value)
    except ValueError as error:
        raise _error(f"{where}: {error}", remedy) from None


def _problem(value: Any, form: Any, at: str) -> str:
    """What is wrong with the value at a place such as "shards[3].records"; "" if it is of the form."""
    kind = form if isinstance(form, type | types.UnionType) else dict if isinstance(form, dict) else list
    if not _is(value, kind):
        names = " or ".join(NAMES[one] for one in (typing.get_args(kind) or (kind,)))
        return f"{at or 'the value'} is {reprlib.repr(value)}, not {names}"
    if isinstance(form, tuple) and len(value) != len(form):
        return f"{at or 'the value'} has {len(value)} entries, not {len(form)}"
    if isinstance(form, tuple):
        parts = enumerate(zip(value, form, strict=True))
        return next(filter(None, (_problem(one, wanted, f"{at}[{i}]") for i, (one, wanted) in parts)), "")
    if isinstance(form, list):
        return next(filter(None, (_problem(one, form[0], f"{at}[{i}]") for i, one in enumerate(value))), "")
    if isinstance(form, dict) and str in form:
        return next(filter(None, (_problem(one, form[str], _field(at, name)) for name, one in value.items())), "")
    if isinstance(form, dict):
        for name, wanted in form.items():
            plain = name.removesuffix("?")
            if plain not in value:
                if plain == name:
                    return f"{_field(at, name)} is missing"
            elif problem := _problem(value[plain], wanted, _field(at, plain)):
                return problem
    return ""


def _is(value: Any, kind: Any) -> bool:
    kinds = typing.get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _field(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _error(problem: str, remedy: str) -> UserError:
    return UserError(f"{problem}: {remedy}" if remedy else problem)
