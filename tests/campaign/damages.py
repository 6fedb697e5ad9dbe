"""Files that a job reads, damaged in every way: cut in half, emptied, one bit flipped, deleted."""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaign.commands import run
from tests.campaign.place import MAIN, MORE, Jobs, fake_encoder
from tests.campaign.results import difference, of_folder, of_run

KINDS = ("cut", "emptied", "flipped", "deleted")
# Read by people alone, or by nothing that goes on: event files, grids and the reports of jobs.
FOR_PEOPLE = ("tensorboard/*", "samples/*", "evaluation.json", "analysis.json")


class Damaged(NamedTuple):
    """A directory with files in `pattern` (globs), one of which is damaged in a copy of it before a job reads it."""

    name: str
    directory: str  # below the inputs
    patterns: tuple[str, ...]
    arguments: Callable[[Jobs, Path, Path], list[str]]  # of the copy, and of a new directory for what the job writes
    result: Callable[[Path, Path], dict]  # of the copy and of that directory
    kinds: tuple[str, ...] = KINDS
    flips: int = 1
    before: Callable[[], None] = lambda: None
    beside: str = ""  # a file beside the directory that belongs to it
    says: tuple[str, ...] = ()  # an error about a damaged file says these


def _resumed(config: str = "labels", updates: int = MORE) -> Callable[[Jobs, Path, Path], list[str]]:
    return lambda jobs, copy, out: jobs.train(copy, config, f"--config.train.updates={updates}")


def _run(copy: Path, out: Path) -> dict:
    found = of_run(copy)
    return found if "error" in found else {"state": found["state"], "samples": found["samples"]}


def _samples(copy: Path, out: Path) -> dict:
    return {path.name: path.read_bytes() for path in sorted((copy / "samples").glob("*.npz"))}


def _copy(copy: Path, out: Path) -> dict:
    return of_folder(copy)


def _out(copy: Path, out: Path) -> dict:
    return of_folder(out)


def _out_run(copy: Path, out: Path) -> dict:
    return _run(out, copy)


def _converted(jobs: Jobs, copy: Path, out: Path) -> list[str]:
    return ["--mode=convert", f"--from={copy}", f"--to={out}"]


def _weights(copy: Path, out: Path) -> dict:
    return {name: value for name, value in of_folder(out).items() if name.endswith(".safetensors")}


NEWEST = "checkpoints/6"
STATE = f"{NEWEST}/state"
SIDE_FILES = ("manifest.json", "*-00000.json")
SHARD = ("*-00001.array_record",)
WEIGHTS = ("manifest.json", "model.safetensors")
DAMAGED = (
    Damaged("a run, resumed", "run", ("config.json", "metrics.jsonl"), _resumed(), _run),
    Damaged("a checkpoint, resumed", "run", (f"{NEWEST}/data/pr*", f"{NEWEST}/loop/_*", f"{NEWEST}/loop/d/*"),
            _resumed(), _run, says=("6", "4")),
    Damaged("a checkpoint, converted", "run",
            (f"{NEWEST}/_*", f"{NEWEST}/checksums.json", f"{STATE}/[!c]*", f"{STATE}/array*/*", f"{STATE}/ocdbt*/*"),
            _converted, _weights, says=("6", "4")),
    Damaged("a checkpoint's arrays, converted", "run", (f"{STATE}/ocdbt*/d/*", f"{STATE}/d/*"), _converted, _weights,
            flips=8, says=("6", "4")),
    Damaged("a checkpoint's marks, converted", "run", (f"{NEWEST}/commit*", f"{NEWEST}/*/commit*"), _converted,
            _weights, kinds=("emptied", "deleted"), says=("6", "4")),
    Damaged("a run of latents and texts, resumed", "texts_run", ("latent.json", "text.json"),
            _resumed("texts", 4), _run, before=fake_encoder),
    Damaged("a run of words, sampled", "words_run", ("words.json", "config.json"),
            lambda jobs, copy, out: jobs.sample(copy, "words", "--prompt=a red circle"), _samples),
    Damaged("latents, trained on", "latents", ("manifest.json", *SHARD),
            lambda jobs, copy, out: jobs.train(out, "latents", f"--config.data.path={copy}"), _out_run, flips=2),
    Damaged("latents, continued", "latents", SIDE_FILES, lambda jobs, copy, out: jobs.prepare(copy), _copy),
    Damaged("latents, continued", "latents", SHARD, lambda jobs, copy, out: jobs.prepare(copy), _copy,
            kinds=("cut", "emptied", "deleted")),
    Damaged("latents, verified", "latents", (*SIDE_FILES, *SHARD), lambda jobs, copy, out: jobs.verify(copy), _copy),
    Damaged("texts, trained on", "texts", SHARD,
            lambda jobs, copy, out: jobs.train(out, "texts", f"--config.data.text={copy}"), _out_run,
            before=fake_encoder),
    Damaged("texts, continued", "texts", SIDE_FILES, lambda jobs, copy, out: jobs.encode(copy), _copy,
            before=fake_encoder),
    Damaged("texts, verified", "texts", (*SIDE_FILES, *SHARD), lambda jobs, copy, out: jobs.verify(copy), _copy),
    Damaged("images, continued", "images", ("000003.png", "labels.npy", "sampling.json"),
            lambda jobs, copy, out: jobs.images(jobs.root / "run", copy), _copy),
    Damaged("geneval, continued", "geneval", ("00001/samples/0002.png", "00001/metadata.jsonl"),
            lambda jobs, copy, out: jobs.export(jobs.root / "words_run", copy, "geneval"), _copy,
            beside=".sampling.json"),
    Damaged("dpg, continued", "dpg", ("item1.png", "../copy.sampling.json"),
            lambda jobs, copy, out: jobs.export(jobs.root / "words_run", copy, "dpg"), _copy,
            beside=".sampling.json"),
    Damaged("an autoencoder, prepared with", "vae", WEIGHTS,
            lambda jobs, copy, out: jobs.prepare(out, "prepare", f"--config.data.vae={copy}"), _out),
    Damaged("weights, sampled from", "dit", ("manifest.json",),
            lambda jobs, copy, out: jobs.sample(out, "plain", f"--config.init.workdir={copy}"),
            lambda copy, out: _samples(out, copy)),
    Damaged("weights, converted", "dit", WEIGHTS, _converted, _weights, flips=4),
)  # fmt: skip


def cases(jobs: Jobs, seed: int, names: tuple[str, ...] = (), most: int = 1000) -> Iterator[tuple[str, str]]:
    """Yields each case and how it ended: "right", "one line", or its fault.

    names, most: only these directories, and at most so many cases of each.
    """
    for damaged in DAMAGED:
        if names and damaged.name not in names:
            continue
        place = jobs.root / "damages" / re.sub(r"\W+", "_", damaged.name)
        copy, out = _copied(jobs, damaged, place)
        outcome = run(MAIN, *damaged.arguments(jobs, copy, out), before=damaged.before)
        wanted = damaged.result(copy, out)
        if outcome.code != 0 or "error" in wanted:
            yield f"{damaged.name}: undamaged", outcome.fault((0,)) or difference(wanted, {})
            continue
        rng = random.Random(f"{seed} {damaged.name}")
        files = [path for pattern in damaged.patterns for path in _each(jobs.root / damaged.directory, pattern)]
        damages = [(path, kind) for path in files for kind in damaged.kinds for _ in range(_times(damaged, kind))]
        for path, kind in damages[:most]:
            copy, out = _copied(jobs, damaged, place)
            what = damage(copy / path, kind, rng)
            yield f"{damaged.name}: {path} {what}", _end(damaged, jobs, copy, out, wanted)


def _each(directory: Path, pattern: str) -> list[str]:
    """The files that match, of those with random names only the largest."""
    if pattern.startswith(".."):
        return [pattern]
    files = sorted(path for path in directory.glob(pattern) if path.is_file())
    random_names = [path for path in files if path.parent.name == "d"]
    files = [path for path in files if path not in random_names]
    files += sorted(random_names, key=lambda path: path.stat().st_size)[-1:]
    return [str(path.relative_to(directory)) for path in files]


def _times(damaged: Damaged, kind: str) -> int:
    return damaged.flips if kind == "flipped" else 1


def _copied(jobs: Jobs, damaged: Damaged, place: Path) -> tuple[Path, Path]:
    copy = place / "copy"  # the same path for every case: some results name it
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(jobs.root / damaged.directory, copy)
    if damaged.beside:
        shutil.copy(jobs.root / f"{damaged.directory}{damaged.beside}", place / f"copy{damaged.beside}")
    return copy, place / "out"


def damage(path: Path, kind: str, rng: random.Random) -> str:
    """Damages the file; returns what was done, in words."""
    data = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return kind
    if kind == "flipped":
        bit = rng.randrange(8 * len(data)) if data else 0
        if data:
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
        return f"with bit {bit} flipped"
    path.write_bytes(data[: len(data) // 2] if kind == "cut" else b"")
    return kind


def _end(damaged: Damaged, jobs: Jobs, copy: Path, out: Path, wanted: dict) -> str:
    outcome = run(MAIN, *damaged.arguments(jobs, copy, out), before=damaged.before)
    fault = outcome.fault()
    if fault:
        return fault
    if outcome.code == 2:
        unsaid = [word for word in damaged.says if not re.search(rf"\b{word}\b", outcome.error)]
        return f"the error does not name {unsaid[0]}: {outcome.error}" if unsaid else "one line"
    found = difference(damaged.result(copy, out), wanted)
    return f"exit 0, but {found}" if found else "right"
