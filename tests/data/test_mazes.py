"""Mazes are trees with one path, a pure function of (split, seed, index), and apart from those of the other split."""

import pickle

import numpy as np
import pytest

from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.layouts import canonical, held_out, symmetries
from trm_diffusion.data.mazes import ROOMS, MazeSource, find_path
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError


@pytest.mark.parametrize("rooms", [3, 4, 9])
def test_a_maze_is_a_tree_and_its_record_shows_it(rooms):
    source, size = MazeSource(rooms), 2 * rooms - 1
    for index in range(10):
        maze, record = source.maze(index), source[index]
        assert maze.open[::2, ::2].all() and not maze.open[1::2, 1::2].any()
        assert maze.open.sum() == 2 * rooms**2 - 1  # rooms, and one opening fewer
        assert record["image"].shape == (size, size, 1) and record["context"].shape == (size, size, 3)
        np.testing.assert_array_equal(record["image"][..., 0] > 0, maze.path)
        np.testing.assert_array_equal(record["context"][..., 0] > 0, maze.open)
        assert [np.argwhere(record["context"][..., end] > 0).tolist() for end in (1, 2)] == [
            [list(maze.start)],
            [list(maze.goal)],
        ]
        assert set(np.unique(record["image"])) == set(np.unique(record["context"])) == {-1, 1}
        assert record["image"].dtype == record["context"].dtype == np.float32 and record["label"] == 0


def test_the_path_and_its_length_are_those_found_by_hand():
    is_open = np.array([[1, 1, 1, 0, 1], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1]], bool)
    path = find_path(is_open, (0, 0), (4, 2))
    wanted = [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(path, wanted)
    source = MazeSource(4)
    for maze in map(source.maze, range(20)):
        assert maze.path.sum() == 2 * maze.length + 1 and 1 <= maze.length < 16


@pytest.mark.parametrize("rooms", [3, 4])
def test_test_mazes_are_not_training_mazes_under_any_symmetry(rooms):
    train, test = (
        [source.maze(i).open for i in range(300)] for source in (MazeSource(rooms), MazeSource(rooms, "test"))
    )
    seen = {one.tobytes() for layout in train for one in symmetries(layout)}
    assert not any(one.tobytes() in seen for layout in test for one in symmetries(layout))
    assert len({canonical(layout) for layout in test}) > 1
    assert {held_out(one) for layout in test for one in symmetries(layout)} == {True}


def test_symmetries_of_a_layout_without_any_are_eight():
    layout = np.arange(9).reshape(3, 3) > 4
    layout[0, 1] = True
    assert len({one.tobytes() for one in symmetries(layout)}) == 8
    assert len({canonical(one) for one in symmetries(layout)}) == 1


def test_records_depend_on_split_seed_and_index_alone():
    source = MazeSource(4)
    again = pickle.loads(pickle.dumps(source))
    for other, same in ((again, True), (MazeSource(4, seed=1), False), (MazeSource(4, "test"), False)):
        assert all((other[i]["context"] == source[i]["context"]).all() for i in (5, 2)) == same
    np.testing.assert_array_equal(MazeSource(3).maze(0).path, RECORD_0)
    assert [int(MazeSource(3).maze(index).path.sum()) for index in range(5)] == [3, 5, 7, 5, 5]


# Of 3 x 3 rooms: other records for the same index would make runs and figures incomparable.
RECORD_0 = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 8}, "an odd number from 5 to 29"),
        ({"image_size": 31}, "an odd number from 5 to 29"),
        ({"split": "seen"}, "splits train, test"),
        ({"context_channels": 0}, "config.data.context_channels=3"),
        ({"num_classes": 10}, "config.data.num_classes=1"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        make_source(DataConfig(**dict(source="mazes", image_size=7, context_channels=3, num_classes=1) | changes))
    assert "\n" not in str(caught.value)


def test_a_maze_of_other_sizes_is_refused():
    with pytest.raises(UserError, match="3 to 15 rooms"):
        MazeSource(ROOMS[1] + 1)
