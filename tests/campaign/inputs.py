"""Malformed inputs for the commands that read what users bring."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.campaign.commands import run
from tests.campaign.kinds import INPUTS, Files, Input, write
from tests.campaign.place import Jobs


def cases(jobs: Jobs, seed: int, names: tuple[str, ...] = (), most: int = 1000) -> Iterator[tuple[str, str]]:
    """Yields each case and how it ended: "right", "one line", or its fault.

    names, most: only these kinds, and at most so many cases of each.
    """
    del seed  # hypothesis is derandomized
    for index, kind in enumerate(INPUTS):
        if names and kind.name not in names:
            continue
        for number, files in enumerate(_examples(kind.files(jobs), min(kind.count, most))):
            place = jobs.root / "inputs" / str(index) / str(number)
            write(place, files)
            yield f"{kind.name} {number} ({place.relative_to(jobs.root)})", _end(kind, jobs, place)


def _examples(strategy: st.SearchStrategy[Files], count: int) -> list[Files]:
    """The same examples in every run."""
    found = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(files):
        found.append(files)

    collect()
    return found


def _end(kind: Input, jobs: Jobs, place: Path) -> str:
    out = place.with_name(f"{place.name}_out")
    outcome = run(kind.module, *kind.arguments(jobs, place, out), before=kind.before)
    fault = outcome.fault()
    if not fault and outcome.code == 0:
        try:
            wrong = kind.wrong(jobs, place, out)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # a plain reading of the file fails
            wrong = f"this should not be read: {error}"
        fault = f"exit 0, but {wrong}" if wrong else ""
    elif not fault and _complete(out):
        fault = f"exit 2, but {out.name} looks complete"
    shutil.rmtree(out, ignore_errors=True)
    return fault or ("one line" if outcome.code else "right")


def _complete(out: Path) -> bool:
    """Whether something at the path could be taken for what the command writes at its end."""
    return out.is_file() or (out / "manifest.json").exists()
