"""The judge of mazes: proved on true and damaged paths, and its figures are those counted by hand."""

import json

import numpy as np
import pytest

from trm_diffusion.config.schema import EvaluateConfig
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.mazes import MazeSource
from trm_diffusion.errors import UserError
from trm_diffusion.metrics import mazes
from trm_diffusion.metrics.judges import judge_class

COUNT = 40


@pytest.fixture(scope="module")
def source():
    return MazeSource(4, "test")


@pytest.fixture
def paths(source):
    return np.stack([source[index]["image"] for index in range(COUNT)])


def test_the_proof_passes_and_is_the_commands_last_line(capsys, monkeypatch):
    monkeypatch.setattr(mazes, "PROOF_MAZES", {3: 10, 5: 6})
    assert mazes.main(["--selfcheck"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["pass"] is True and report["5x5"]["damaged"] == 6 * 81
    assert report["5x5"]["noisy"] == 6 * 82 and report["3x3"]["true_solved"] == 1.0


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("wrong_cells", lambda images, paths: np.zeros(len(images), int)),  # everything is solved
        ("canonical", lambda layout: b""),  # all layouts are alike
        ("_is_proper", lambda maze: False),
    ],
)
def test_the_proof_fails_for_a_judge_or_mazes_that_are_wrong(monkeypatch, name, fails):
    monkeypatch.setattr(mazes, name, fails)
    assert mazes.prove_judge({3: 4})["pass"] is False


def test_mazes_and_paths_that_are_none_are_seen(source):
    maze = source.maze(0)
    assert mazes._is_perfect(maze.open) and mazes._is_proper(maze)
    for cell in np.argwhere(np.indices(maze.open.shape).sum(0) % 2 == 1):  # an opening more or fewer
        layout = maze.open.copy()
        layout[tuple(cell)] ^= True
        assert not mazes._is_perfect(layout)
    for cell in np.ndindex(maze.path.shape):
        path = maze.path.copy()
        path[cell] ^= True
        assert not mazes._is_proper(mazes_with(maze, path))


def mazes_with(maze, path):
    return type(maze)(maze.open, maze.start, maze.goal, path)


def test_figures_are_those_counted_by_hand(source, paths):
    images = 0.75 * paths
    images[3, 2, 2] *= -0.1  # one wrong cell, undecided
    for number in range(10, COUNT):
        images[number, 1, 1] = 0.75  # a path through a wall
    report = mazes.evaluate_mazes(images, source)
    assert report["solved"] == 9 / COUNT and report["num_images"] == COUNT
    low, high = report["solved_95"]
    assert 0.10 < low < 9 / COUNT < high < 0.39
    assert report["cells_right"] == pytest.approx(1 - 31 / (COUNT * 49))
    assert report["leaves_open_cells"] == pytest.approx(30 / COUNT)
    assert report["undecided_cells"] == pytest.approx(1 / (COUNT * 49))
    assert report["margin_median"] == pytest.approx(0.75)
    lengths = [source.maze(index).length for index in range(COUNT)]
    groups = {"1-5": range(1, 6), "6-9": range(6, 10), "10-13": range(10, 14), "14-17": range(14, 18)}
    for name, found in report["by_length"].items():
        members = [index for index in range(COUNT) if lengths[index] in groups[name]]
        right = [index for index in members if index < 10 and index != 3]
        assert (found["mazes"], found["solved"]) == (len(members), pytest.approx(len(right) / len(members)))
    assert sum(found["mazes"] for found in report["by_length"].values()) == COUNT


def test_paths_of_other_mazes_are_not_solutions(source, paths):
    assert mazes.evaluate_mazes(np.roll(paths, -1, 0), source)["shuffled_solved"] == 1.0
    assert mazes.evaluate_mazes(np.roll(paths, -1, 0), source)["solved"] < 0.1
    assert mazes.evaluate_mazes(-np.ones_like(paths), source)["solved"] == 0.0


def test_the_judge_asks_for_records_of_the_test_split_and_shows_them(source, paths):
    data = DataConfig(source="mazes", image_size=7, context_channels=3, num_classes=1)
    judge = judge_class("mazes")(data, EvaluateConfig(kind="mazes", num_samples=COUNT), seed=0, per_class=2)
    asked = []

    def generate(records):
        asked.extend(records)
        images = np.stack([record["image"] for record in records])
        images[0] *= -1
        return images

    evaluation = judge.evaluate(generate)
    np.testing.assert_array_equal(asked[7]["context"], source[7]["context"])
    assert evaluation.passed and evaluation.measures["solved"] == 1 - 1 / COUNT
    picture = evaluation.pictures["evaluation"]
    assert picture.images.shape == (12, 23, 7, 3) and picture.captions[:2] == ["49 wrong", "solved"]
    np.testing.assert_array_equal(picture.images[1, 8:15, :, 0], picture.images[1, 16:, :, 2])


def test_images_that_are_not_finite_are_refused(source, paths):
    paths[5, 0, 0] = np.nan
    with pytest.raises(UserError, match="the first is number 5"):
        mazes.evaluate_mazes(paths, source)
