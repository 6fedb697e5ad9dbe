"""Do more latent steps solve longer mazes, with the same weights?

    python -m benchmarks.reasoning NAME=WORKDIR ... [--latent_steps=1,2,4,8] [--sides=4,5,6] [--mazes=1024]
    python -m benchmarks.reasoning --figure=docs/reasoning.png

The first measures trained runs of configs/maze.py or configs/frozen_lake.py and adds them to `--save`, by name:

    by_latent_steps   solved share, in all and by path length, at each T
    by_side           the same at the trained T, on mazes (rooms a side) or lakes (cells a side) of other sizes
    halting           mean latent steps against path length, with halting by convergence

The second draws the solved share against T, a line for each path length, from `--save`; it needs matplotlib
(requirements-plots.txt). All rows draw the same mazes of the test split, from the same noise. Intervals are over mazes
(Clopper and Pearson).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from benchmarks.controls import cost
from benchmarks.measure import progress, report, rounded
from trm_diffusion.analysis.halting import mean_latent_steps
from trm_diffusion.config import Config
from trm_diffusion.data.frozen_lake import CELL, FrozenLakeSource, size_of
from trm_diffusion.data.mazes import MazeSource, rooms_of
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.sample import draw_all, make_sample_fn
from trm_diffusion.metrics.judges import judge_class
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.run.workdir import load_config
from trm_diffusion.runtime.parameters import Parameters

SAVE = "docs/results/reasoning.json"
EPSILONS = (0.05, 0.2, 0.5)  # of halting by convergence
BATCH = 64  # mazes of about one length, whose latent steps are averaged
FIELDS = ("solved", "solved_95", "by_length")  # of an evaluation


def measure(workdir: str, *, latent_steps: Sequence[int], sides: Sequence[int], mazes: int) -> dict:
    """The record of one run, for JSON."""
    saved = load_config(epath.Path(workdir))
    experiment, state = load_run(saved, epath.Path(workdir))
    parameters = sampling_parameters(experiment, state)
    recursive = saved.model.recursion.blocks != "none"
    trained = saved.train.latent_steps or ((saved.model.recursion.latent_steps,) if recursive else ())
    record = {
        "data": saved.data.source,
        "side": _side(saved),
        "updates": int(state.step),
        "batch_size": saved.train.batch_size,
        "seed": saved.seed,
        "depth": saved.model.depth,
        "recursion": _recursion(saved) if recursive else None,
        "trained_latent_steps": list(trained),
        **{name: value for name, value in cost(saved).items() if name != "trained_parameters"},
    }
    if not recursive:
        record["by_latent_steps"] = {"none": solved(saved, parameters, mazes)}
    else:
        own = {max(trained), *latent_steps}
        record["by_latent_steps"] = {
            str(steps): solved(_with(saved, latent_steps=steps), parameters, mazes) for steps in sorted(own)
        }
        record["halting"] = [halting(saved, parameters, epsilon, mazes) for epsilon in EPSILONS]
    record["by_side"] = {str(side): solved(_with(saved, side=side), parameters, mazes) for side in sides}
    return record


def solved(config: Config, parameters: Parameters, mazes: int) -> dict:
    """The judge's solved shares, for the first `mazes` of the test split."""
    experiment = build(config)
    draw = make_sample_fn(experiment)
    evaluation = dataclasses.replace(config.evaluate, num_samples=mazes)
    judge = judge_class(config.evaluate.kind)(
        config.data, evaluation, seed=config.sample.seed, per_class=config.sample.per_class
    )

    def generate(requested):
        return np.concatenate(list(draw_all(draw, config, parameters, experiment.condition.encode(requested))))

    found = judge.evaluate(generate).measures
    progress(f"{config.name}, side {_side(config)}, T {config.sample.latent_steps}: {found['solved']:.3f} solved")
    return {name: found[name] for name in FIELDS}


def halting(config: Config, parameters: Parameters, epsilon: float, mazes: int) -> dict:
    """Mean latent steps of the run's blocks and diffusion steps, in batches of mazes of about one path length."""
    recursion = dataclasses.replace(config.model.recursion, halting="convergence", halting_epsilon=epsilon)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, recursion=recursion))
    experiment = build(config)
    source = _source(config)
    draw = make_sample_fn(experiment, with_reports=True)
    lengths = np.array([_length(source, index) for index in range(mazes)])
    order, size = np.argsort(lengths, kind="stable"), min(BATCH, mazes)
    batches = [order[first : first + size] for first in range(0, mazes - size + 1, size)]
    points = []
    for rows in batches:
        condition = experiment.condition.encode([source[int(row)] for row in rows])
        _, reports = draw(parameters, condition, rows)
        points.append([float(lengths[rows].mean()), float(mean_latent_steps(reports).mean())])
    progress(f"{config.name}, halting {epsilon}: {points[0]} .. {points[-1]}")
    return {"epsilon": epsilon, "length_and_mean_latent_steps": points, **solved(config, parameters, mazes)}


def _with(config: Config, *, latent_steps: int | None = None, side: int | None = None) -> Config:
    """The config with another T at sampling, or with mazes of another size."""
    if latent_steps is not None:
        return dataclasses.replace(config, sample=dataclasses.replace(config.sample, latent_steps=latent_steps))
    size = 2 * side - 1 if config.data.source == "mazes" else CELL * side
    return dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=size))


def _side(config: Config) -> int:
    return (rooms_of if config.data.source == "mazes" else size_of)(config.data.image_size)


def _source(config: Config):
    return (MazeSource if config.data.source == "mazes" else FrozenLakeSource)(_side(config), "test")


def _length(source, index: int) -> int:
    return (source.maze(index) if isinstance(source, MazeSource) else source.lake(index)).length


def _recursion(config: Config) -> dict:
    """The fields of the recursion that differ from their defaults."""
    recursion = config.model.recursion
    fields = dataclasses.fields(recursion)
    return {field.name: value for field in fields if (value := getattr(recursion, field.name)) != field.default}


def draw_figure(rows: dict[str, dict], path: str) -> None:
    """Solved share against T, a panel for each run and a line for each path length."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--figure needs matplotlib: pip install -r requirements-plots.txt") from None
    recursive = {name: row for name, row in rows.items() if row["recursion"] is not None}
    figure = Figure(figsize=(3.2 * len(recursive), 3.2), layout="constrained")
    panels = figure.subplots(1, len(recursive), sharey=True, squeeze=False)[0]
    for axes, (name, row) in zip(panels, recursive.items(), strict=True):
        found = row["by_latent_steps"]
        steps = [int(one) for one in found]
        lengths = next(iter(found.values()))["by_length"]
        for number, length in enumerate(lengths):
            shares = [one["by_length"][length] for one in found.values()]
            low, high = np.array([share["solved_95"] for share in shares]).T
            shade = str(0.75 - 0.75 * number / max(1, len(lengths) - 1))
            axes.plot(steps, [share["solved"] for share in shares], "o-", color=shade, label=f"path {length}", ms=3)
            axes.fill_between(steps, low, high, color=shade, alpha=0.15, lw=0)
        axes.set(title=name, xlabel="latent steps T", xticks=steps, ylim=(0, 1))
        for trained in row["trained_latent_steps"]:
            axes.axvline(trained, color="tab:orange", lw=1, ls=":")
    panels[0].set_ylabel("solved")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoning", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=WORKDIR", help="trained runs to measure")
    parser.add_argument("--latent_steps", default="1,2,4,6,8", help="T at sampling")
    parser.add_argument("--sides", default="", help="rooms or cells a side, beside the trained size")
    parser.add_argument("--mazes", type=int, default=1024, help="mazes of the test split for each figure")
    parser.add_argument("--save", default=SAVE, help="JSON file of all rows")
    parser.add_argument("--figure", default="", help="PNG to draw from the rows whose names start with --prefix")
    parser.add_argument("--prefix", default="", help="rows to draw")
    options = parser.parse_args(arguments)
    save = Path(options.save)
    rows = json.loads(save.read_text())["rows"] if save.exists() else {}
    counts = {
        name: [int(one) for one in getattr(options, name).split(",") if one] for name in ("latent_steps", "sides")
    }
    for run in options.runs:
        name, _, workdir = run.partition("=")
        rows[name] = rounded(measure(workdir, mazes=options.mazes, **counts))
    if options.figure:
        chosen = {name: row for name, row in rows.items() if name.startswith(options.prefix)}
        draw_figure(chosen, options.figure)
    passed = all(row["updates"] > 0 and row["by_latent_steps"] for row in rows.values()) and bool(rows)
    report("reasoning", {"mazes": options.mazes, "rows": rows, "pass": passed}, options.save if options.runs else "")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
