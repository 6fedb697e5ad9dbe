"""FrozenLake: a context image of the lake, and as the target the same image with one of its shortest paths drawn in.

Maps are gymnasium's own: n x n cells of ice and holes, the start at the top left, the goal at the bottom right, and a
path between them. Their packages are listed in requirements-frozen-lake.txt.

A layout is where the holes are. One layout in four is held out for the split "test", together with everything that a
rotation or reflection makes of it, so a model meets none of the test layouts in training.

Record i is a pure function of (seed, split, i), with the pinned versions of gymnasium and NumPy; there is nothing to
store and nothing to download.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_context_element
from trm_diffusion.data.layouts import SPLITS, held_out
from trm_diffusion.data.scenes.source import Draws
from trm_diffusion.errors import UserError

SIZES = (4, 16)  # least and most cells a side
CELL = 4  # pixels a side of a cell
DENSITIES = (0.1, 0.2, 0.3, 0.4)  # chance of a hole in a cell before maps without a path are discarded; equally likely

LETTERS = "FHSG"  # gymnasium's: frozen, hole, start, goal
FROZEN, HOLE, START, GOAL, PATH = range(5)  # what a cell shows
COLORS = np.array([[1, 1, 1], [-1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, -1]], np.float32)  # of each, in RGB
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # by row and column, of gymnasium's actions: left, down, right, up

_STREAM = 2_000  # apart from the streams of other sources

Cell = tuple[int, int]  # row, column


@dataclasses.dataclass(frozen=True)
class Lake:
    """A map and one of its shortest paths.

    Attributes:
      rows: n strings of n LETTERS, as gymnasium has them.
      density: the one of DENSITIES that it was drawn with.
      path: the cells from start to goal, both included.
    """

    rows: tuple[str, ...]
    density: float
    path: tuple[Cell, ...]

    @property
    def length(self) -> int:
        """Moves from start to goal."""
        return len(self.path) - 1

    @property
    def cells(self) -> np.ndarray:
        """What each cell shows before a path is drawn, int [n, n]."""
        return cells_of(self.rows)


def gymnasium_lake():
    """gymnasium's module of FrozenLake. Raises UserError where it is not installed."""
    try:
        from gymnasium.envs.toy_text import frozen_lake
    except ImportError as error:
        raise UserError(
            f"config.data.source=frozen_lake needs packages ({error}): run pip install -r requirements-frozen-lake.txt"
        ) from error
    return frozen_lake


def cells_of(rows: Sequence[str]) -> np.ndarray:
    """Letters as what a cell shows, int [n, n]."""
    return np.array([[LETTERS.index(letter) for letter in row] for row in rows])


def draw(cells: np.ndarray) -> np.ndarray:
    """What each cell shows, int [n, n], in flat colours: float32 [CELL n, CELL n, 3]."""
    return COLORS[cells].repeat(CELL, 0).repeat(CELL, 1)


def with_path(cells: np.ndarray, path: Sequence[Cell]) -> np.ndarray:
    """A copy of the cells, int [n, n], with a path between its ends, which keep their colours."""
    drawn = cells.copy()
    drawn[tuple(np.transpose(path[1:-1]))] = PATH
    return drawn


def beside(cell: Cell, size: int) -> list[Cell]:
    """The cells that one move leads to."""
    around = [(cell[0] + down, cell[1] + right) for down, right in MOVES]
    return [(row, column) for row, column in around if 0 <= row < size and 0 <= column < size]


@functools.lru_cache(maxsize=2**13)
def count_paths(rows: tuple[str, ...]) -> dict[Cell, tuple[int, int]]:
    """For each cell from which the goal can be reached: moves to the goal, and number of ways with so few."""
    goal = (len(rows) - 1, len(rows) - 1)
    found, queue = {goal: (0, 1)}, [goal]
    for cell in queue:
        moves, ways = found[cell]
        for row, column in beside(cell, len(rows)):
            if rows[row][column] == "H":
                continue
            known = found.get((row, column))
            if known is None:
                queue.append((row, column))
            if known is None or known[0] == moves + 1:
                found[row, column] = (moves + 1, ways + (known[1] if known else 0))
    return found


def draw_path(rows: tuple[str, ...], draws: Draws) -> tuple[Cell, ...]:
    """A shortest path from start to goal, all equally likely."""
    found, path = count_paths(rows), [(0, 0)]
    number = draws.choice(range(found[0, 0][1]))  # of the path, in the order of MOVES
    while found[path[-1]][0]:
        for cell in beside(path[-1], len(rows)):
            if cell in found and found[cell][0] < found[path[-1]][0]:
                if number < found[cell][1]:
                    path.append(cell)
                    break
                number -= found[cell][1]
    return tuple(path)


class FrozenLakeSource(Source):
    """An endless supply of lakes, cut into epochs.

    The context [CELL n, CELL n, 3] is the lake in COLORS, the image the same with a shortest path drawn in.

    Splits: train, and test, whose layouts do not occur in train, under no rotation or reflection.
    """

    has_context = True
    context_channels = 3
    num_classes = 1
    mirrored = ("image", "context")
    in_memory = True

    def __init__(
        self,
        size: int,
        split: str = "train",
        *,
        seed: int = 0,
        densities: Sequence[float] = DENSITIES,
        num_lakes: int = 2**20,
    ):
        gymnasium_lake()
        if split not in SPLITS:
            raise UserError(f"config.data.split={split!r}: frozen lakes have the splits {', '.join(SPLITS)}")
        if not SIZES[0] <= size <= SIZES[1]:
            raise UserError(f"frozen lakes have {SIZES[0]} to {SIZES[1]} cells a side, not {size}")
        self.size, self.split, self.seed, self.densities = size, split, seed, tuple(densities)
        self.sample_shape = (CELL * size, CELL * size, 3)
        self._num_lakes = num_lakes

    @classmethod
    def from_config(cls, config: DataConfig) -> "FrozenLakeSource":
        return cls(size_of(config.image_size), config.split)

    @classmethod
    def focus(cls, context: np.ndarray) -> tuple[int, int]:
        """The goal, in the last cell."""
        return context.shape[0] - 1, context.shape[1] - 1

    def __len__(self) -> int:
        return self._num_lakes

    def __getitem__(self, index: int) -> Element:
        lake = self.lake(index)
        return make_context_element(draw(with_path(lake.cells, lake.path)), draw(lake.cells), 0, index)

    def lake(self, index: int) -> Lake:
        """Lake `index` itself."""
        draws = Draws(self.seed, _STREAM + SPLITS.index(self.split), index)
        density = draws.choice(self.densities)
        generate = gymnasium_lake().generate_random_map
        while True:
            rows = tuple(map(str, generate(self.size, 1 - density, draws.choice(range(2**32)))))
            if held_out(cells_of(rows) == HOLE) == (self.split == "test"):
                return Lake(rows, density, draw_path(rows, draws))


def size_of(image_size: int) -> int:
    """Cells a side of a lake drawn on this many pixels a side. Raises UserError where there is no such lake."""
    low, high = (CELL * size for size in SIZES)
    if image_size % CELL or not low <= image_size <= high:
        raise UserError(
            f"config.data.image_size={image_size}: frozen lakes have {CELL} pixels a cell, a multiple of {CELL} from "
            f"{low} to {high}"
        )
    return image_size // CELL
