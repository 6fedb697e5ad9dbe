"""Shared by the benchmarks with external evaluators: complete exports, JSON lines, one-line errors."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterable

from trm_diffusion.errors import EXIT_USER_ERROR, UserError
from trm_diffusion.readers.folders import list_below
from trm_diffusion.readers.paths import local_path


def check_files(directory: str | pathlib.Path, expected: Iterable[str]) -> None:
    """Checks that the files below `directory`, but for junk, are exactly the expected ones, given relative to it.

    Raises:
      UserError: a missing or an extra file; names the first one and counts the others.
    """
    directory = local_path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: export the images there first")
    present = set(list_below(directory))
    expected = set(expected)
    for names, what, remedy in (
        (expected - present, "missing", "run the export again, which continues where it stopped"),
        (present - expected, "not part of the export", "move them away"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{directory}: {min(names)}{others} {what}: {remedy}")


def print_json(compute: Callable[[], dict]) -> int:
    """Prints the result of `compute` as one line of JSON, or its UserError as one line; returns the exit code."""
    try:
        print(json.dumps(compute()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0
