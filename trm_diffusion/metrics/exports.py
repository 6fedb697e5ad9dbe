"""Shared by the benchmarks with external evaluators: complete exports, JSON lines, one-line errors."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterable

from trm_diffusion.errors import EXIT_USER_ERROR, UserError


def check_files(directory: str | pathlib.Path, expected: Iterable[str]) -> None:
    """Checks that the files below `directory`, but for hidden ones, are the expected ones, given relative to it.

    Raises:
      UserError: a missing or an extra file; names the first one and counts the others.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: export the images there first")
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("[!.]*") if not path.is_dir()}
    expected = set(expected)
    for names, what, remedy in (
        (expected - present, "missing", "run the export again, which continues where it stopped"),
        (present - expected, "not part of the export", "move them away"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{directory}: {min(names)}{others} {what}: {remedy}")


def read_json_lines(path: str | pathlib.Path, required: tuple[str, ...]) -> list[dict]:
    """Reads a file with one JSON object per line; empty lines are skipped.

    Raises:
      UserError: an unreadable or empty file, or a line without one of the required keys.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); is the file cut off?") from None
        absent = [key for key in required if not isinstance(record, dict) or key not in record]
        if absent:
            raise UserError(f"{path}, line {number}: no {absent[0]!r}; each line needs {', '.join(required)}")
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no records")
    return records


def read_text(path: str | pathlib.Path) -> str:
    try:
        return pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason}") from None


def print_json(compute: Callable[[], dict]) -> int:
    """Prints the result of `compute` as one line of JSON, or its UserError as one line; returns the exit code."""
    try:
        print(json.dumps(compute()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0
