"""The judge of mazes: is exactly the path drawn?

`python -m trm_diffusion.metrics.mazes --selfcheck` proves the judge, as one line of JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from trm_diffusion.analysis.grids import stacked
from trm_diffusion.data.layouts import canonical
from trm_diffusion.data.mazes import MazeSource, rooms_of
from trm_diffusion.metrics.intervals import share_with_interval
from trm_diffusion.metrics.judges import Evaluation, Judge, Picture, checked_images

ROWS_SHOWN = 6
UNDECIDED = 0.5  # a cell nearer to 0 than this, of -1 and 1, is called undecided
LENGTHS_APART = 4  # lengths of a path are reported in groups 1-5, 6-9, 10-13, ...

PROOF_MAZES = {3: 200, 4: 200, 8: 100, 15: 40}  # by rooms a side
PROOF_SIGMA = 0.1  # of white noise added to cells in [0, 1]


class MazeJudge(Judge):
    """The share of mazes of the test split that are solved: the sign of every cell is right."""

    sources = ("mazes",)
    condition = "context image"

    def evaluate(self, generate):
        source = MazeSource(rooms_of(self.data.image_size), "test")
        records = [source[index] for index in range(self.settings.num_samples)]
        images = generate(records)
        measures = evaluate_mazes(images, source)
        shown = [np.stack([record[name] for record in records]) for name in ("context", "image")]
        rows = slice(ROWS_SHOWN * self.per_class)
        wrong = wrong_cells(images, shown[1])[rows]
        captions = [f"{count} wrong" if count else "solved" for count in wrong]
        picture = Picture(stacked(shown[0][rows], images[rows], shown[1][rows]), captions)
        return Evaluation(measures, measures["solved"] >= self.settings.min_solved, {"evaluation": picture})


def wrong_cells(images: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """The number [N] of cells of images [N, S, S, 1] whose sign is not that of the path's, [N, S, S, 1] of -1 and 1."""
    return ((np.asarray(images) > 0) != (paths > 0)).sum((1, 2, 3))


def evaluate_mazes(images: np.ndarray, source: MazeSource) -> dict:
    """Judges one generated image for each of the source's first N mazes.

    Args:
      images: [N, S, S, 1], nominally -1 and 1; image i was drawn for `source.maze(i)`.

    Returns:
      A dict for JSON:
        num_images, rooms, split: what was judged.
        solved, solved_95: share of mazes of which every cell is right; Clopper and Pearson's interval.
        by_length: {"1-5": {"mazes", "solved", "solved_95"}, ...}, by moves from room to room on the true path.
        cells_right: share of all cells.
        leaves_open_cells: share of images that draw a path on a wall.
        undecided_cells: share of cells of less than UNDECIDED; margin_median: over images, of the cell nearest to 0.
        shuffled_solved: share of images that solve the next maze instead: what a path drawn at random would reach.

    Raises:
      UserError: images that are not finite.
    """
    images = checked_images(images, source.sample_shape, "mazes")
    mazes = [source.maze(index) for index in range(len(images))]
    paths = np.stack([np.where(maze.path, 1, -1) for maze in mazes])[..., None]
    walls = ~np.stack([maze.open for maze in mazes])[..., None]
    wrong, lengths = wrong_cells(images, paths), np.array([maze.length for maze in mazes])
    solved, groups = wrong == 0, np.maximum(0, lengths - 2) // LENGTHS_APART
    return {
        "num_images": len(images),
        "rooms": source.rooms,
        "split": source.split,
        **share_with_interval("solved", solved),
        "by_length": {
            _length_name(group): {
                "mazes": int((groups == group).sum()),
                **share_with_interval("solved", solved[groups == group]),
            }
            for group in np.unique(groups)
        },
        "cells_right": float(1 - wrong.sum() / images.size),
        "leaves_open_cells": float(((images > 0) & walls).any((1, 2, 3)).mean()),
        "undecided_cells": float((np.abs(images) < UNDECIDED).mean()),
        "margin_median": float(np.median(np.abs(images).min((1, 2, 3)))),
        "shuffled_solved": float((wrong_cells(images, np.roll(paths, -1, 0)) == 0).mean()),
    }


def _length_name(group: int) -> str:
    return f"{LENGTHS_APART * group + 2 if group else 1}-{LENGTHS_APART * (group + 1) + 1}"


def prove_judge(mazes: dict[int, int] | None = None) -> dict:
    """Holds the judge and the mazes against what is known of them; mazes: how many, by rooms a side.

    Returns:
      A dict for JSON, for each number of rooms a side:
        true_solved: share of true paths that are judged solved.
        proper_paths: share of true paths that are one line of open cells from start to goal, without a branch.
        perfect: share of mazes in which all rooms are joined, and by no more openings than that takes.
        damaged, damaged_solved: images with a single cell changed, every cell of every maze, and those judged solved.
        noisy, noise_changes: images, true and damaged, with noise of PROOF_SIGMA, and those whose verdict changes.
        layouts: {split: different layouts among the mazes, up to symmetry}; layouts_in_both: of both splits.
      and `pass`, whether all of it is as it should be.
    """
    report, passed = {"noise_sigma": PROOF_SIGMA}, True
    for rooms, count in (mazes or PROOF_MAZES).items():
        splits = {name: MazeSource(rooms, name) for name in ("train", "test")}
        drawn = {name: [source.maze(index) for index in range(count)] for name, source in splits.items()}
        layouts = {name: {canonical(maze.open) for maze in some} for name, some in drawn.items()}
        found = _prove_verdicts(np.stack([splits["test"][index]["image"] for index in range(count)]))
        every = drawn["train"] + drawn["test"]
        found |= {
            "proper_paths": float(np.mean([_is_proper(maze) for maze in every])),
            "perfect": float(np.mean([_is_perfect(maze.open) for maze in every])),
            "layouts": {name: len(some) for name, some in layouts.items()},
            "layouts_in_both": len(layouts["train"] & layouts["test"]),
        }
        passed &= found["true_solved"] == found["proper_paths"] == found["perfect"] == 1
        passed &= not (found["damaged_solved"] or found["noise_changes"] or found["layouts_in_both"])
        report[f"{rooms}x{rooms}"] = found
    return report | {"pass": bool(passed)}


def _prove_verdicts(paths: np.ndarray) -> dict:
    """Verdicts about true paths [N, S, S, 1], about them with each cell changed in turn, and about both with noise."""
    rng, cells = np.random.default_rng(0), paths[0].size
    changed = 1 - 2 * np.eye(cells, dtype=np.float32).reshape(cells, *paths.shape[1:])  # -1 at one cell of each
    solved, counts = 0, {"damaged": 0, "damaged_solved": 0, "noisy": 0, "noise_changes": 0}
    for path in paths:
        images = path * np.concatenate([np.ones_like(path)[None], changed])
        noise = 2 * PROOF_SIGMA * rng.standard_normal(images.shape, np.float32)  # [-1, 1] is twice as wide as [0, 1]
        clean, noisy = (wrong_cells(some, path[None]) == 0 for some in (images, images + noise))
        solved += bool(clean[0])
        counts["damaged"] += cells
        counts["damaged_solved"] += int(clean[1:].sum())
        counts["noisy"] += len(images)
        counts["noise_changes"] += int((clean != noisy).sum())
    return {"true_solved": solved / len(paths), **counts}


def _neighbours(cells: np.ndarray) -> np.ndarray:
    """Of each cell [S, S], how many of the four beside it are set."""
    padded = np.pad(cells.astype(int), 1)
    return padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]


def _is_proper(maze) -> bool:
    """The path's cells are open; its ends are start and goal; each other cell has two beside it; all are joined."""
    beside = _neighbours(maze.path)
    ends = {tuple(map(int, cell)) for cell in np.argwhere(maze.path & (beside == 1))}
    inner = maze.path & (beside == 2)
    joined = _reached(maze.path, maze.start).sum() == maze.path.sum() == inner.sum() + 2
    return bool(not (maze.path & ~maze.open).any() and ends == {maze.start, maze.goal} and joined)


def _is_perfect(is_open: np.ndarray) -> bool:
    """All rooms are open and joined, and the openings between them are one fewer than the rooms: a tree."""
    rooms = is_open[::2, ::2].size
    whole = is_open[::2, ::2].all() and not is_open[1::2, 1::2].any()
    return bool(whole and is_open.sum() == 2 * rooms - 1 and (_reached(is_open, (0, 0)) == is_open).all())


def _reached(cells: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """The cells that are joined to the start, by spreading from it; apart from the search that finds the paths."""
    reached = np.zeros_like(cells)
    reached[start] = True
    while True:
        more = cells & (reached | (_neighbours(reached) > 0))
        if (more == reached).all():
            return reached
        reached = more


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trm_diffusion.metrics.mazes", description=__doc__.split("\n")[0])
    parser.add_argument("--selfcheck", action="store_true", required=True, help="prove the judge and the mazes")
    parser.parse_args(arguments)
    proof = prove_judge()
    print(json.dumps(proof))
    return 0 if proof["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
