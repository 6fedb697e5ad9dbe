"""Perfect mazes: a context image of the maze with its start and goal, and as the target its only path.

A maze of n x n rooms is a spanning tree of their grid, drawn on (2n - 1) x (2n - 1) cells: rooms at even rows and
columns, between two neighbours a cell that is open or wall, and wall between every four rooms. So two rooms are joined
by exactly one path. Trees are drawn by a randomised depth-first search, which makes long paths likely.

A layout is a maze without its start and goal. One layout in four is held out for the split "test", together with
everything that a rotation or reflection makes of it, so a model meets none of the test layouts in training.

Record i is a pure function of (seed, split, i); there is nothing to store and nothing to download.
"""

import dataclasses

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_context_element
from trm_diffusion.data.layouts import SPLITS, held_out
from trm_diffusion.data.scenes.source import Draws
from trm_diffusion.errors import UserError

ROOMS = (3, 15)  # least and most a side
CONTEXT = ("open", "start", "goal")  # channels of the context image

_WALL, _OPEN, _UNSEEN = 0, 1, 2  # cells while a maze is drawn
_STREAM = 1_000  # apart from the streams of other sources


@dataclasses.dataclass(frozen=True)
class Maze:
    """Cells of a maze, by row and column.

    Attributes:
      open: bool [S, S], whether one can stand there.
      start, goal: two different rooms.
      path: bool [S, S], the cells of the path between them, both included.
    """

    open: np.ndarray
    start: tuple[int, int]
    goal: tuple[int, int]
    path: np.ndarray

    @property
    def length(self) -> int:
        """Moves from room to room on the path."""
        return int(self.path.sum()) // 2


def draw_layout(rooms: int, draws: Draws) -> np.ndarray:
    """The open cells of a random perfect maze, bool [2 rooms - 1, 2 rooms - 1]."""
    width = 2 * rooms + 1  # with a border, so that every room has four cells around it
    cells = bytearray(width * width)  # plain bytes: single cells of arrays are slow to read
    for room in (width * row + column for row in range(1, width, 2) for column in range(1, width, 2)):
        cells[room] = _UNSEEN
    trail = [width * (2 * draws.choice(range(rooms)) + 1) + 2 * draws.choice(range(rooms)) + 1]
    cells[trail[0]] = _OPEN
    moves = (1, width, -1, -width)
    while trail:
        room = trail[-1]
        ahead = [move for move in moves if cells[room + move] == _WALL and _unseen(cells, room + 2 * move)]
        if not ahead:
            trail.pop()
            continue
        move = ahead[0] if len(ahead) == 1 else draws.choice(ahead)
        trail.append(room + 2 * move)
        cells[room + move] = cells[room + 2 * move] = _OPEN
    return np.frombuffer(cells, np.uint8).reshape(width, width)[1:-1, 1:-1] == _OPEN


def _unseen(cells: bytearray, cell: int) -> bool:
    return 0 <= cell < len(cells) and cells[cell] == _UNSEEN


def find_path(is_open: np.ndarray, start: tuple[int, int], goal: tuple[int, int]) -> np.ndarray:
    """The cells of the path between two open cells of a perfect maze, bool [S, S]."""
    cells, came_from, found = is_open.tolist(), {goal: goal}, [goal]
    size = len(cells)
    for row, column in found:
        for cell in ((row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column)):
            if 0 <= cell[0] < size and 0 <= cell[1] < size and cells[cell[0]][cell[1]] and cell not in came_from:
                came_from[cell] = (row, column)
                found.append(cell)
    path, cell = np.zeros_like(is_open), start
    path[goal] = True
    while cell != goal:
        path[cell] = True
        cell = came_from[cell]
    return path


class MazeSource(Source):
    """An endless supply of mazes, cut into epochs.

    The image [S, S, 1] is 1 on the path and -1 elsewhere; the context [S, S, 3] is 1 on open cells, on the start and on
    the goal, by channel, and -1 elsewhere.

    Splits: train, and test, whose layouts do not occur in train, under no rotation or reflection.
    """

    has_context = True
    context_channels = len(CONTEXT)
    num_classes = 1
    mirrored = ("image", "context")
    in_memory = True
    held_out_split = "test"

    def __init__(self, rooms: int, split: str = "train", *, seed: int = 0, num_mazes: int = 2**20):
        if split not in SPLITS:
            raise UserError(f"config.data.split={split!r}: mazes have the splits {', '.join(SPLITS)}")
        if not ROOMS[0] <= rooms <= ROOMS[1]:
            raise UserError(f"mazes have {ROOMS[0]} to {ROOMS[1]} rooms a side, not {rooms}")
        self.rooms, self.split, self.seed = rooms, split, seed
        self.sample_shape = (2 * rooms - 1, 2 * rooms - 1, 1)
        self._num_mazes = num_mazes

    @classmethod
    def from_config(cls, config: DataConfig) -> "MazeSource":
        return cls(rooms_of(config.image_size), config.split)

    @classmethod
    def focus(cls, context: np.ndarray) -> tuple[int, int]:
        """The goal."""
        goal = context[..., CONTEXT.index("goal")]
        return divmod(int(goal.argmax()), goal.shape[1])

    def __len__(self) -> int:
        return self._num_mazes

    def __getitem__(self, index: int) -> Element:
        maze = self.maze(index)
        context = np.full((*maze.open.shape, len(CONTEXT)), -1, np.float32)
        context[maze.open, 0] = context[(*maze.start, 1)] = context[(*maze.goal, 2)] = 1
        return make_context_element(np.where(maze.path, 1, -1)[..., None], context, 0, index)

    def maze(self, index: int) -> Maze:
        """Maze `index` itself."""
        draws = Draws(self.seed, _STREAM + SPLITS.index(self.split), index)
        while True:
            layout = draw_layout(self.rooms, draws)
            if held_out(layout) == (self.split == "test"):
                break
        ends = draws.two(range(self.rooms**2))
        start, goal = ((2 * (room // self.rooms), 2 * (room % self.rooms)) for room in ends)
        return Maze(layout, start, goal, find_path(layout, start, goal))


def rooms_of(image_size: int) -> int:
    """Rooms a side of a maze of this many cells a side. Raises UserError where there is no such maze."""
    low, high = (2 * rooms - 1 for rooms in ROOMS)
    if image_size % 2 == 0 or not low <= image_size <= high:
        raise UserError(
            f"config.data.image_size={image_size}: mazes of n x n rooms have 2 n - 1 cells a side, an odd number from "
            f"{low} to {high}"
        )
    return (image_size + 1) // 2
