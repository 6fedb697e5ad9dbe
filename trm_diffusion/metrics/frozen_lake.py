"""The judge of FrozenLake: the drawn path is read from the picture and walked in gymnasium's environment.

`python -m trm_diffusion.metrics.frozen_lake --selfcheck` proves the judge, as one line of JSON.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from trm_diffusion.analysis.grids import stacked
from trm_diffusion.data.frozen_lake import (
    CELL,
    COLORS,
    FROZEN,
    HOLE,
    MOVES,
    PATH,
    Cell,
    FrozenLakeSource,
    cells_of,
    count_paths,
    draw,
    gymnasium_lake,
    size_of,
    with_path,
)
from trm_diffusion.data.layouts import canonical
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.intervals import share_with_interval
from trm_diffusion.metrics.judges import Evaluation, Judge, Picture, checked_images

VERDICTS = {
    "optimal": "a shortest path",
    "longer": "reaches the goal with more moves than needed",
    "hole": "walks into a hole",
    "diagonal": "start and goal are joined by diagonal moves alone",
    "disconnected": "start and goal are not joined",
    "branched": "they are joined, but the drawn cells are not one line",
    "frame_changed": "a cell beside the path is not what it was",
}
SOLVED = ("optimal", "longer")
ROWS_SHOWN = 6
UNDECIDED = 0.5  # a cell nearer than this to another colour, of at least 1 from a pure colour, is called undecided

PROOF_LAKES = {4: 100, 8: 20, 16: 4}  # by cells a side
PROOF_STRINGS = 4000  # of actions, for each number of cells a side
PROOF_SIGMA = 0.1  # of white noise added to pixels in [0, 1]

_JOINED_WITH_DIAGONALS = np.ones((3, 3), int)
_BESIDE = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])


class FrozenLakeJudge(Judge):
    """The share of lakes of the test split that are solved: the path leads to the goal, and all else is unchanged."""

    sources = ("frozen_lake",)
    condition = "context image"

    def evaluate(self, generate):
        source = FrozenLakeSource(size_of(self.data.image_size), "test")
        records = [source[index] for index in range(self.settings.num_samples)]
        images = generate(records)
        measures = evaluate_lakes(images, source)
        count = min(len(images), ROWS_SHOWN * self.per_class)
        contexts, paths = (np.stack([record[name] for record in records[:count]]) for name in ("context", "image"))
        verdicts = judge_images(images[:count], [source.lake(index).rows for index in range(count)])
        captions = [verdict.replace("_", " ") for verdict in verdicts]
        picture = Picture(stacked(contexts, images[:count], paths), captions)
        return Evaluation(measures, measures["solved"] >= self.settings.min_solved, {"evaluation": picture})


def read_cells(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each cell of images [N, CELL n, CELL n, 3] shows: the nearest of COLORS to its mean colour, int [N, n, n].

    Returns also each cell's margin, float [N, n, n]: its distance in RGB to the nearest colour that would be read
    otherwise.
    """
    count, side = len(images), images.shape[1] // CELL
    means = np.asarray(images, np.float64).reshape(count, side, CELL, side, CELL, 3).mean((2, 4))
    squared = ((means[..., None, :] - COLORS) ** 2).sum(-1)  # [N, n, n, colours]
    cells = squared.argmin(-1)
    between = np.linalg.norm(COLORS[:, None] - COLORS, axis=-1)[cells]  # from the cell's colour to each other
    ahead = squared - squared.min(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.where(between > 0, ahead / (2 * between), np.inf)  # to the plane halfway between two colours
    return cells, margins.min(-1)


def judge_images(images: np.ndarray, maps: Sequence[tuple[str, ...]]) -> list[str]:
    """One of VERDICTS about each of images [N, CELL n, CELL n, 3], drawn for N maps."""
    return [judge_cells(cells, rows) for cells, rows in zip(read_cells(images)[0], maps, strict=True)]


def judge_cells(cells: np.ndarray, rows: tuple[str, ...]) -> str:
    """One of VERDICTS about cells, int [n, n], drawn for a map."""
    lake, drawn = cells_of(rows), cells == PATH
    if ((cells != lake) & ~(drawn & np.isin(lake, (FROZEN, HOLE)))).any():
        return "frame_changed"
    drawn[0, 0] = drawn[-1, -1] = True
    labels, parts = ndimage.label(drawn)
    if labels[0, 0] != labels[-1, -1]:
        labels, _ = ndimage.label(drawn, _JOINED_WITH_DIAGONALS)
        return "diagonal" if labels[0, 0] == labels[-1, -1] else "disconnected"
    degrees = ndimage.convolve(drawn.astype(int), _BESIDE, mode="constant")
    degrees[0, 0] += 1
    degrees[-1, -1] += 1
    if parts > 1 or (degrees[drawn] != 2).any():
        return "branched"
    actions = actions_of(_ordered(drawn))
    if not walk(rows, actions)[1]:
        return "hole"
    return "optimal" if len(actions) == count_paths(rows)[0, 0][0] else "longer"


def _ordered(drawn: np.ndarray) -> list[Cell]:
    """The cells of a line, bool [n, n], from the top left to the bottom right."""
    path, left = [(0, 0)], {(int(row), int(column)) for row, column in np.argwhere(drawn)} - {(0, 0)}
    while left:
        path.append(next(cell for cell in _ahead(path[-1]) if cell in left))
        left.remove(path[-1])
    return path


def _ahead(cell: Cell) -> list[Cell]:
    return [(cell[0] + down, cell[1] + right) for down, right in MOVES]


def actions_of(path: Sequence[Cell]) -> list[int]:
    """gymnasium's actions along cells, each beside the one before."""
    return [MOVES.index((b[0] - a[0], b[1] - a[1])) for a, b in zip(path[:-1], path[1:], strict=True)]


@functools.lru_cache(maxsize=1024)
def _environment(rows: tuple[str, ...]):
    return gymnasium_lake().FrozenLakeEnv(desc=list(rows), is_slippery=False)


def walk(rows: tuple[str, ...], actions: Sequence[int]) -> tuple[list[Cell], bool]:
    """The cells that gymnasium's environment, not slippery, is in, until the episode ends; and whether at the goal."""
    environment = _environment(rows)
    visited, reward = [divmod(environment.reset(seed=0)[0], len(rows))], 0
    for action in actions:
        state, reward, ended, *_ = environment.step(action)
        visited.append(divmod(state, len(rows)))
        if ended:
            break
    return visited, reward > 0


def evaluate_lakes(images: np.ndarray, source: FrozenLakeSource) -> dict:
    """Judges one generated image for each of the source's first N lakes.

    Args:
      images: [N, CELL n, CELL n, 3], nominally in COLORS; image i was drawn for `source.lake(i)`.

    Returns:
      A dict for JSON:
        num_images, size, split: what was judged; maps: different maps among them.
        solved, solved_95: share of lakes with the verdict optimal or longer; Clopper and Pearson's interval.
        verdicts: share of each of VERDICTS.
        by_length: {"6": {"lakes", "solved", "solved_95"}, ...}, by moves of a shortest path; by_density: by the chance
          of a hole that the lake was drawn with.
        undecided_cells: share of cells with a margin below UNDECIDED; margin_median: over images, of the least margin.
        shuffled_solved: share of images whose path solves the next lake: what a path drawn without looking would reach.

    Raises:
      UserError: images that are not finite.
    """
    images = checked_images(images, source.sample_shape, "frozen lakes")
    lakes = [source.lake(index) for index in range(len(images))]
    cells, margins = read_cells(images)
    verdicts = np.array([judge_cells(one, lake.rows) for one, lake in zip(cells, lakes, strict=True)])
    solved = np.isin(verdicts, SOLVED)
    elsewhere = [_moved(one, lake.cells) for one, lake in zip(cells, [*lakes[1:], lakes[0]], strict=True)]
    shuffled = [judge_cells(one, lake.rows) for one, lake in zip(elsewhere, [*lakes[1:], lakes[0]], strict=True)]
    return {
        "num_images": len(images),
        "size": source.size,
        "split": source.split,
        "maps": len({lake.rows for lake in lakes}),
        **share_with_interval("solved", solved),
        "verdicts": {name: float((verdicts == name).mean()) for name in VERDICTS},
        "by_length": _shares_by([lake.length for lake in lakes], solved),
        "by_density": _shares_by([lake.density for lake in lakes], solved),
        "undecided_cells": float((margins < UNDECIDED).mean()),
        "margin_median": float(np.median(margins.min((1, 2)))),
        "shuffled_solved": float(np.isin(shuffled, SOLVED).mean()),
    }


def _moved(cells: np.ndarray, lake: np.ndarray) -> np.ndarray:
    """The path of some cells in another lake, both int [n, n]."""
    return np.where((cells == PATH) & np.isin(lake, (FROZEN, HOLE)), PATH, lake)


def _shares_by(values: Sequence, solved: np.ndarray) -> dict:
    groups = {value: np.equal(values, value) for value in sorted(set(values))}
    return {
        str(value): {"lakes": int(group.sum()), **share_with_interval("solved", solved[group])}
        for value, group in groups.items()
    }


def prove_judge(lakes: dict[int, int] | None = None, strings: int = PROOF_STRINGS) -> dict:
    """Holds the judge and the lakes against what is known of them.

    Args:
      lakes: how many of each split, by cells a side.
      strings: how many random strings of actions to walk, for each number of cells a side.

    Returns:
      A dict for JSON, for each number of cells a side:
        true_optimal: share of true paths with the verdict optimal.
        shortest: share of lakes whose path has as few moves as it takes to spread from the start to the goal.
        damaged, damaged_solved: images with one cell of another colour, every cell and colour, and those judged solved.
        noisy, noise_changes: images, true and damaged, with noise of PROOF_SIGMA, and those whose verdict changes.
        strings, strings_at_goal, strings_apart: walked in gymnasium; those that reach the goal; those on which the
          cells or the end differ from what MOVES says.
        layouts: {split: different layouts among the lakes, up to symmetry}; layouts_in_both: of both splits.
      and `pass`, whether all of it is as it should be.
    """
    report, passed = {"noise_sigma": PROOF_SIGMA}, True
    for size, count in (lakes or PROOF_LAKES).items():
        splits = {name: FrozenLakeSource(size, name) for name in ("train", "test")}
        drawn = {name: [source.lake(index) for index in range(count)] for name, source in splits.items()}
        layouts = {name: {canonical(lake.cells == HOLE) for lake in some} for name, some in drawn.items()}
        every = drawn["train"] + drawn["test"]
        found = _prove_verdicts(drawn["test"]) | _prove_walks(every, strings)
        found |= {
            "shortest": float(np.mean([lake.length == _spread(lake.cells != HOLE) for lake in every])),
            "layouts": {name: len(some) for name, some in layouts.items()},
            "layouts_in_both": len(layouts["train"] & layouts["test"]),
        }
        passed &= found["true_optimal"] == found["shortest"] == 1 and found["strings_at_goal"] > 0
        passed &= not any(found[name] for name in _MUST_BE_NONE)
        report[f"{size}x{size}"] = found
    return report | {"pass": bool(passed)}


_MUST_BE_NONE = ("damaged_solved", "noise_changes", "strings_apart", "layouts_in_both")


def _prove_verdicts(lakes: Sequence) -> dict:
    """Verdicts about true paths, about them with each cell changed to each other colour, and about both with noise."""
    rng = np.random.default_rng(0)
    optimal, counts = 0, {"damaged": 0, "damaged_solved": 0, "noisy": 0, "noise_changes": 0}
    for lake in lakes:
        true = with_path(lake.cells, lake.path)
        some = [true]
        for cell in np.ndindex(true.shape):
            for color in set(range(len(COLORS))) - {int(true[cell])}:
                some.append(true.copy())
                some[-1][cell] = color
        images = np.stack([draw(cells) for cells in some])
        noise = 2 * PROOF_SIGMA * rng.standard_normal(images.shape, np.float32)  # [-1, 1] is twice as wide as [0, 1]
        clean, noisy = (judge_images(one, [lake.rows] * len(images)) for one in (images, images + noise))
        optimal += clean[0] == "optimal"
        counts["damaged"] += len(images) - 1
        counts["damaged_solved"] += sum(verdict in SOLVED for verdict in clean[1:])
        counts["noisy"] += len(images)
        counts["noise_changes"] += sum(a != b for a, b in zip(clean, noisy, strict=True))
    return {"true_optimal": optimal / len(lakes), **counts}


def _prove_walks(lakes: Sequence, strings: int) -> dict:
    """Random actions after a random part of a true path, walked in gymnasium and by MOVES."""
    rng = np.random.default_rng(0)
    at_goal = apart = 0
    for number in range(strings):
        lake = lakes[number % len(lakes)]
        true = actions_of(lake.path)
        actions = true[: rng.integers(len(true) + 1)] + rng.integers(0, 4, len(lake.rows)).tolist()
        found = walk(lake.rows, actions)
        at_goal += found[1]
        apart += found != _follow(lake.rows, actions)
    return {"strings": strings, "strings_at_goal": at_goal, "strings_apart": apart}


def _follow(rows: tuple[str, ...], actions: Sequence[int]) -> tuple[list[Cell], bool]:
    """What `walk` returns, by MOVES: at the edge one stays; a hole and the goal end it."""
    visited = [(0, 0)]
    for action in actions:
        row, column = _ahead(visited[-1])[action]
        visited.append((min(max(row, 0), len(rows) - 1), min(max(column, 0), len(rows) - 1)))
        if rows[visited[-1][0]][visited[-1][1]] in "HG":
            break
    return visited, rows[visited[-1][0]][visited[-1][1]] == "G"


def _spread(is_open: np.ndarray) -> int:
    """Moves until the goal is reached from the start, by spreading over open cells, bool [n, n]."""
    reached, moves = np.zeros_like(is_open), 0
    reached[0, 0] = True
    while not reached[-1, -1] and moves < is_open.size:
        reached, moves = ndimage.binary_dilation(reached, mask=is_open), moves + 1
    return moves


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trm_diffusion.metrics.frozen_lake", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--selfcheck", action="store_true", required=True, help="prove the judge and the lakes")
    parser.parse_args(arguments)
    try:
        proof = prove_judge()
    except UserError as error:  # gymnasium is not installed
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(proof))
    return 0 if proof["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
