"""Jobs that are killed at counted points and started again."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaign.commands import run
from tests.campaign.place import MAIN, Jobs, fake_encoder
from tests.campaign.points import Point, watch
from tests.campaign.results import debris, difference, of_folder, of_run, reason


class Killed(NamedTuple):
    name: str
    arguments: Callable[[Jobs, Path], list[str]]  # of the job that writes to the path
    result: Callable[[Path], dict]
    kills: int
    cuts: int
    full: int
    before: Callable[[], None] = lambda: None


KILLED = (
    Killed("training", lambda jobs, out: jobs.train(out), of_run, 12, 4, 4),
    Killed(
        "training without compiled programs",
        lambda jobs, out: jobs.train(out, "labels", f"--compilation_cache={out / 'cache'}"),
        of_run,
        2,
        1,
        0,
    ),
    Killed("prepare", lambda jobs, out: jobs.prepare(out), of_folder, 6, 2, 2),
    Killed("encode", lambda jobs, out: jobs.encode(out), of_folder, 5, 2, 2, fake_encoder),
    Killed("images", lambda jobs, out: jobs.images(jobs.root / "run", out), of_folder, 5, 1, 2),
    Killed("geneval", lambda jobs, out: jobs.export(jobs.root / "words_run", out, "geneval"), of_folder, 4, 1, 1),
    Killed("dpg", lambda jobs, out: jobs.export(jobs.root / "words_run", out, "dpg"), of_folder, 4, 1, 1),
)


def cases(jobs: Jobs, seed: int, names: tuple[str, ...] = (), most: int = 100) -> Iterator[tuple[str, str]]:
    """Yields each case and how it ended: "right", or its fault.

    names, most: only these jobs, and at most so many points of each.
    """
    for job in KILLED:
        if names and job.name not in names:
            continue
        place = jobs.root / "kills" / job.name.replace(" ", "_")
        shutil.rmtree(place, ignore_errors=True)
        whole = place / "whole" / "out"
        before = _both(job.before, watch(whole, Point(0, "count")))
        outcome = run(MAIN, *job.arguments(jobs, whole), before=before)
        wanted = job.result(whole)
        if outcome.code != 0 or "error" in wanted:
            yield f"{job.name}: left alone", outcome.fault((0,)) or difference(wanted, {})
            continue
        operations = outcome.output.count("operation: ")
        largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        rng = random.Random(f"{seed} {job.name}")
        for number, point in enumerate(_points(job, operations, largest, rng)[:most]):
            out = place / str(number) / "out"
            yield f"{job.name} ({operations} operations): {point}", _end(job, jobs, out, point, wanted)


def _points(job: Killed, operations: int, largest: int, rng: random.Random) -> list[Point]:
    """One point in each of equal parts of all operations, a third of them requests to stop.

    Then sizes below that of the largest file, evenly spread on a logarithmic scale.
    """
    points = []
    for part in range(job.kills):
        number = 1 + int((part + rng.random()) * operations / job.kills)
        points.append(Point(number, "stop" if part % 3 == 1 else "kill"))
    for how, count in (("cut", job.cuts), ("full", job.full)):
        points += [Point(int(largest ** ((part + rng.random()) / count)), how) for part in range(count)]
    return points


def _end(job: Killed, jobs: Jobs, out: Path, point: Point, wanted: dict) -> str:
    arguments = job.arguments(jobs, out)
    first = run(MAIN, *arguments, before=_both(job.before, watch(out, point)))
    codes = {"kill": (-signal.SIGKILL,), "stop": (75, 0), "cut": (-signal.SIGXFSZ,), "full": (2, 0)}[point.how]
    if first.code not in codes or first.fault(codes):
        return f"the job that was to end there: {first.fault(codes)}"
    second = run(MAIN, *arguments, before=job.before)
    if second.code != 0:
        return f"started again: {second.fault((0,)) or reason(second)}"
    found = difference(job.result(out), wanted)
    if found:
        return f"started again: {found}"
    left = debris(out.parent)
    return f"started again, leaves {left}" if left else "right"


def _both(one: Callable[[], None], other: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        one()
        other()

    return both
