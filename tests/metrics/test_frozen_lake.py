"""The judge of FrozenLake: proved on true and damaged paths, and each verdict on a picture made for it."""

import json
import sys

import numpy as np
import pytest

from trm_diffusion.config.schema import EvaluateConfig
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.frozen_lake import COLORS, PATH, FrozenLakeSource, cells_of, draw
from trm_diffusion.errors import UserError
from trm_diffusion.metrics import frozen_lake as judging
from trm_diffusion.metrics.judges import judge_class

COUNT = 24
ROWS = ("SFFFF", "FHFFF", "FFFFF", "FFFFF", "FFFFG")


@pytest.fixture(scope="module")
def source():
    return FrozenLakeSource(4, "test")


@pytest.fixture
def images(source):
    return np.stack([source[index]["image"] for index in range(COUNT)])


def test_the_proof_passes_and_is_the_commands_last_line(capsys, monkeypatch):
    monkeypatch.setattr(judging, "PROOF_LAKES", {4: 6, 5: 2})
    assert judging.main(["--selfcheck"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["pass"] is True and report["4x4"]["damaged"] == 6 * 16 * 4
    assert report["5x5"]["noisy"] == 2 * (1 + 25 * 4) and report["4x4"]["true_optimal"] == 1.0
    assert sum(report[size]["strings"] for size in ("4x4", "5x5")) == 8000 and report["4x4"]["strings_at_goal"] > 500
    monkeypatch.setitem(sys.modules, "gymnasium.envs.toy_text", None)
    assert judging.main(["--selfcheck"]) == 2
    assert "requirements-frozen-lake.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("judge_cells", lambda cells, rows: "optimal"),
        ("canonical", lambda layout: b""),  # all layouts are alike
        ("_spread", lambda is_open: 5),  # paths are longer than needed
        ("MOVES", ((0, 1), (1, 0), (0, -1), (-1, 0))),  # left and right exchanged
    ],
)
def test_the_proof_fails_for_a_judge_or_lakes_that_are_wrong(monkeypatch, name, fails):
    monkeypatch.setattr(judging, name, fails)
    assert judging.prove_judge({4: 3}, strings=30)["pass"] is False


def test_the_proof_walks_10_000_strings():
    assert len(judging.PROOF_LAKES) * judging.PROOF_STRINGS >= 10_000


@pytest.mark.parametrize(
    ("drawing", "verdict"),
    [
        (["S****", ".o..*", "....*", "....*", "....G"], "optimal"),
        (["S....", "*o***", "***.*", "....*", "....G"], "longer"),
        (["S*...", ".*...", ".*...", ".****", "....G"], "hole"),
        (["S***.", ".o..*", "....*", "....*", "....G"], "diagonal"),
        (["S....", ".*...", "..*..", "...*.", "....G"], "diagonal"),
        (["S**.*", ".o..*", "....*", "....*", "....G"], "disconnected"),
        (["S....", ".o...", ".....", ".....", "....G"], "disconnected"),
        (["S****", ".o*.*", "....*", "....*", "....G"], "branched"),
        (["S****", "*o..*", "*...*", "*...*", "****G"], "branched"),
        (["S****", ".o..*", "*...*", "....*", "....G"], "branched"),  # a cell apart
        (["S****", ".o.**", "...**", "....*", "....G"], "branched"),  # two cells wide
        (["S****", "....*", "....*", "....*", "....G"], "frame_changed"),  # the hole is gone
        (["S****", ".o..*", "..o.*", "....*", "....G"], "frame_changed"),
        (["*****", ".o..*", "....*", "....*", "....G"], "frame_changed"),
        (["S****", ".o..*", "....*", "....*", "....*"], "frame_changed"),
        (["S****", ".o..*", "....*", "....*", "...GG"], "frame_changed"),
    ],
)
def test_verdicts(drawing, verdict):
    cells = np.array([[".oSG*".index(letter) for letter in row] for row in drawing])
    assert judging.judge_images(draw(cells)[None], [ROWS]) == [verdict]


def test_cells_are_read_by_their_mean_colour_with_the_margin_to_the_next():
    cells = cells_of(ROWS)
    found, margins = judging.read_cells(draw(cells)[None])
    np.testing.assert_array_equal(found[0], cells)
    assert margins.min() == pytest.approx(1) and margins.max() == pytest.approx(2**0.5)
    nearly = draw(cells)
    nearly[:4, 4:8] = 0.6 * COLORS[PATH] + 0.4 * COLORS[0]  # frozen before
    nearly[:4, 4:8] += np.linspace(-1, 1, 16).reshape(4, 4, 1)  # same mean
    found, margins = judging.read_cells(nearly[None])
    assert found[0, 0, 1] == PATH and margins[0, 0, 1] == pytest.approx(0.1 * 8**0.5)


def test_figures_are_those_counted_by_hand(source, images):
    lakes = [source.lake(index) for index in range(COUNT)]
    images[3] = source[3]["context"]  # no path
    images[5] = -1  # all holes
    images[0, 4:8, 4:8] *= 0.2  # dark: undecided
    report = judging.evaluate_lakes(images, source)
    verdicts = judging.judge_images(images, [lake.rows for lake in lakes])
    assert verdicts[3] == "disconnected" and verdicts[5] == "frame_changed"
    assert report["solved"] == pytest.approx(np.isin(verdicts, judging.SOLVED).mean())
    low, high = report["solved_95"]
    assert 0 < low < report["solved"] < high < 1
    assert report["verdicts"]["disconnected"] == pytest.approx(1 / COUNT)
    assert sum(report["verdicts"].values()) == pytest.approx(1)
    assert report["undecided_cells"] == pytest.approx(1 / images[..., ::4, ::4, 0].size)
    assert sum(group["lakes"] for group in report["by_density"].values()) == COUNT
    assert set(report["by_density"]) == {str(lake.density) for lake in lakes}
    assert set(report["by_length"]) == {str(lake.length) for lake in lakes}
    assert report["maps"] == len({lake.rows for lake in lakes}) and report["margin_median"] == pytest.approx(1)


def test_paths_drawn_without_looking_are_measured(source, images):
    lakes = [source.lake(index) for index in range(COUNT)]
    fits = [
        all(lakes[(index + 1) % COUNT].rows[row][column] != "H" for row, column in lakes[index].path)
        for index in range(COUNT)
    ]
    assert 0 < sum(fits) < COUNT
    assert judging.evaluate_lakes(images, source)["shuffled_solved"] == pytest.approx(np.mean(fits))


def test_the_judge_asks_for_records_of_the_test_split_and_shows_them(source):
    data = DataConfig(source="frozen_lake", image_size=16, channels=3, context_channels=3, num_classes=1)
    settings = EvaluateConfig(kind="frozen_lake", num_samples=COUNT)
    judge = judge_class("frozen_lake")(data, settings, seed=0, per_class=2)
    asked = []

    def generate(records):
        asked.extend(records)
        images = np.stack([record["image"] for record in records])
        images[0] = records[0]["context"]
        return images

    evaluation = judge.evaluate(generate)
    np.testing.assert_array_equal(asked[7]["context"], source[7]["context"])
    assert evaluation.passed and evaluation.measures["solved"] == 1 - 1 / COUNT
    picture = evaluation.pictures["evaluation"]
    assert picture.images.shape == (12, 50, 16, 3) and picture.captions[:2] == ["disconnected", "optimal"]


def test_images_that_are_not_finite_are_refused(source, images):
    images[5, 0, 0] = np.nan
    with pytest.raises(UserError, match="generated frozen lakes are not finite .the first is number 5"):
        judging.evaluate_lakes(images, source)
