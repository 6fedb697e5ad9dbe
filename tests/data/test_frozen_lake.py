"""Lakes are gymnasium's, their paths are shortest ones, all equally likely, and splits share no layout."""

import itertools
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from trm_diffusion.data import frozen_lake
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.frozen_lake import DENSITIES, FrozenLakeSource, count_paths, draw, draw_path, with_path
from trm_diffusion.data.layouts import canonical, symmetries
from trm_diffusion.data.scenes.source import Draws
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError

CONFIG = dict(source="frozen_lake", image_size=16, channels=3, context_channels=3, num_classes=1)


@pytest.mark.parametrize("size", [4, 7])
def test_a_record_shows_the_lake_and_a_path_over_ice(size):
    source = FrozenLakeSource(size)
    assert source.mirrored == ("image", "context")
    for index in range(10):
        lake, record = source.lake(index), source[index]
        assert lake.rows[0][0] == "S" and lake.rows[-1][-1] == "G" and lake.density in DENSITIES
        assert lake.path[0] == (0, 0) and lake.path[-1] == (size - 1, size - 1)
        assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in itertools.pairwise(lake.path))
        inner = set(lake.path[1:-1])
        assert {lake.rows[row][column] for row, column in inner} == {"F"} and len(inner) == lake.length - 1
        assert record["image"].shape == record["context"].shape == (4 * size, 4 * size, 3)
        assert record["image"].dtype == record["context"].dtype == np.float32 and record["label"] == 0
        changed = (record["image"] != record["context"]).any(-1)[::4, ::4]
        assert {tuple(cell) for cell in np.argwhere(changed)} == inner
        np.testing.assert_array_equal(record["context"], draw(lake.cells))
        np.testing.assert_array_equal(record["image"], draw(with_path(lake.cells, lake.path)))


def test_the_number_of_shortest_paths_is_that_found_by_trying_all():
    rows = ("SFFF", "FHFF", "FFFH", "FFFG")
    moves, ways = count_paths(rows)[0, 0]
    paths = set()
    for downs in itertools.combinations(range(6), 3):
        cell, cells = (0, 0), [(0, 0)]
        for move in range(6):
            cell = (cell[0] + 1, cell[1]) if move in downs else (cell[0], cell[1] + 1)
            cells.append(cell)
        if not any(rows[row][column] == "H" for row, column in cells):
            paths.add(tuple(cells))
    assert (moves, ways) == (6, len(paths))
    drawn = Counter(draw_path(rows, Draws(0, 0, index)) for index in range(900))
    assert set(drawn) == paths
    assert chisquare(list(drawn.values())).pvalue > 0.01
    assert count_paths(("SFHF", "HFHF", "FFHF", "FFFG"))[0, 0] == (6, 1)
    assert (0, 3) not in count_paths(("SFHF", "FFHH", "FFFF", "FFFG"))  # cut off


def test_test_lakes_are_not_training_lakes_under_any_symmetry():
    train, test = ([FrozenLakeSource(4, split).lake(i).cells == 1 for i in range(300)] for split in ("train", "test"))
    seen = {one.tobytes() for layout in train for one in symmetries(layout)}
    assert not any(one.tobytes() in seen for layout in test for one in symmetries(layout))
    assert len({canonical(layout) for layout in test}) > 20


def test_records_depend_on_split_seed_and_index_alone():
    source = FrozenLakeSource(4)
    again = pickle.loads(pickle.dumps(source))
    for other, same in ((again, True), (FrozenLakeSource(4, seed=1), False), (FrozenLakeSource(4, "test"), False)):
        assert all((other[i]["image"] == source[i]["image"]).all() for i in (5, 2)) == same
    assert source.lake(0).rows == RECORD_0  # others would make runs and figures incomparable


RECORD_0 = ("SFFF", "FHFF", "FFFF", "FFFG")


def test_densities_are_those_asked_for():
    few, many = (FrozenLakeSource(8, densities=(density,)) for density in (0.1, 0.3))
    holes = [np.mean([source.lake(i).cells == 1 for i in range(50)]) for source in (few, many)]
    assert 0.05 < holes[0] < 0.13 and 0.2 < holes[1] < 0.3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 18}, "a multiple of 4 from 16 to 64"),
        ({"image_size": 68}, "a multiple of 4 from 16 to 64"),
        ({"split": "seen"}, "splits train, test"),
        ({"channels": 1}, "config.data.channels=3"),
        ({"context_channels": 0}, "config.data.context_channels=3"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        make_source(DataConfig(**CONFIG | changes))
    assert "\n" not in str(caught.value)


def test_without_gymnasium_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium.envs.toy_text", None)
    with pytest.raises(UserError, match="pip install -r requirements-frozen-lake.txt"):
        make_source(DataConfig(**CONFIG))
    with pytest.raises(UserError, match="4 to 16 cells"):
        monkeypatch.undo()
        FrozenLakeSource(frozen_lake.SIZES[1] + 1)
