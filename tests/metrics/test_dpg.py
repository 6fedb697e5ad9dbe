"""DPG-Bench: grids, cascading zeros, and both aggregations of a toy set computed by hand."""

import json
import pathlib

import numpy as np
import pytest

from trm_diffusion.errors import EXIT_USER_ERROR, UserError
from trm_diffusion.metrics import dpg

SHARED_PROMPTS = pathlib.Path(__file__).parents[2].parent / "shared/data/dpg_bench_prompts.jsonl"
HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)
ROWS = [
    "car,a red car,,1,0,entity,whole,entity - whole (car),Is there a car?",
    'car,a red car,,2,1,attribute,color,"attribute - color (car, red)",Is the car red?',
    'car,a red car,,3,0,relation,spatial,"relation - spatial (car, road, on)",Is the car on a road?',
    "cat,a black cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?",
    'cat,a black cat,,2,1,attribute,color,"attribute - color (cat, black)",Is the cat black?',
]
ANSWERS = {
    "car": [["yes", "yes", "yes"]] * 4,
    "cat": [["yes", "yes"], ["no", "yes"], ["yes", "no"], ["no", "yes"]],  # 1, 0, 1/2, 0: in all 3/8
}


@pytest.fixture
def csv_path(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    path.write_text(HEADER + "\n".join(ROWS) + "\n")
    return path


def test_a_zero_cascades_in_csv_order():
    def questions(*parents):
        return [dpg.Question(i + 1, parents[i], "entity - whole", "?", i) for i in range(len(parents))]

    chain = questions((), (1,), (2,))
    assert dpg.score_crop(chain, ["no", "yes", "yes"]) == ([0, 1, 1], [0, 0, 0])
    assert dpg.score_crop(chain, ["yes", "no", "yes"]) == ([1, 0, 1], [1, 0, 0])
    assert dpg.score_crop(chain, ["Yes", "yes", "yes."]) == ([0, 1, 0], [0, 0, 0])  # exactly "yes"
    assert dpg.score_crop(questions((), (), (1, 2)), ["yes", "no", "yes"])[1] == [1, 0, 0]
    # The child comes before its parent, which is zeroed only later: the child keeps its score.
    assert dpg.score_crop(questions((2,), (3,), ()), ["yes", "yes", "no"])[1] == [1, 0, 0]


def test_corrected_uses_all_rows_and_all_crops(csv_path):
    result = dpg.aggregate(dpg.read_questions(csv_path), ANSWERS, "corrected")
    assert result["score"] == pytest.approx(100 * (1 + 3 / 8) / 2)
    assert result["l2"] == {"attribute - color": 62.5, "entity - whole": 75, "relation - spatial": 100}
    assert result["l1"] == {"attribute": 62.5, "entity": 75, "relation": 100}
    assert (result["num_images"], result["dropped"]) == (2, [])


def test_official_keeps_the_slips_of_the_reference(csv_path):
    """The first row is ignored, and it is the parent of the car's second question: the car is left out."""
    result = dpg.aggregate(dpg.read_questions(csv_path), ANSWERS, "official")
    assert result["score"] == pytest.approx(37.5)
    assert result["l2"] == {"attribute - color": 100, "entity - whole": 0}  # the last crop, before zeroing
    assert result["l1"] == {"attribute": 100, "entity": 0}
    assert (result["num_images"], result["dropped"]) == (1, ["car"])

    csv_path.write_text(HEADER + "\n".join(ROWS).replace("car,,2,1", "car,,2,0") + "\n")
    car = [["no", "no", "yes"]] * 4  # the first question does not count
    result = dpg.aggregate(dpg.read_questions(csv_path), ANSWERS | {"car": car}, "official")
    assert result["score"] == pytest.approx(100 * (1 / 2 + 3 / 8) / 2)
    assert result["l2"] == {"attribute - color": 50, "entity - whole": 0, "relation - spatial": 100}


def test_an_absent_image_is_dropped_by_official_and_refused_by_corrected(csv_path):
    questions, answers = dpg.read_questions(csv_path), {"car": ANSWERS["car"]}
    with pytest.raises(UserError, match="item cat has no answers"):
        dpg.aggregate(questions, answers, "corrected")
    with pytest.raises(UserError, match="none of the items"):
        dpg.aggregate(questions, answers, "official")
    assert dpg.aggregate(questions, {"cat": ANSWERS["cat"]}, "official")["dropped"] == ["car"]
    questions["car"] = questions["car"][:1]  # without the first row the car has no question
    assert dpg.aggregate(questions, {"car": [["yes"]] * 4, "cat": ANSWERS["cat"]}, "official")["dropped"] == ["car"]
    with pytest.raises(UserError, match="item cat needs 4 crops of 2 answers"):
        dpg.aggregate(questions, {"cat": ANSWERS["car"]}, "official")


def test_grids_are_cut_as_they_were_put_together():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), np.uint8)
    grid = dpg.make_grid(images)
    np.testing.assert_array_equal(grid[:3, :5], images[0])  # top left
    np.testing.assert_array_equal(grid[:3, 5:], images[1])  # top right
    np.testing.assert_array_equal(grid[3:, :5], images[2])  # bottom left
    np.testing.assert_array_equal(dpg.split_grid(grid), images)


def test_asking_is_resumable_and_the_command_scores_the_answers(tmp_path, csv_path, capsys):
    folder, answers_path = tmp_path / "images", tmp_path / "answers.jsonl"
    for number, item_id in enumerate(ANSWERS):
        images = np.stack([np.full((2, 2, 3), 10 * number + crop, np.uint8) for crop in range(4)])
        dpg.write_grid(folder, item_id, images)
    questions = dpg.read_questions(csv_path)
    asked = []

    def vqa(image: np.ndarray, question: str) -> str:
        number, crop = divmod(int(image[0, 0, 0]), 10)
        item_id = tuple(ANSWERS)[number]
        asked.append(item_id)
        return ANSWERS[item_id][crop][[q.text for q in questions[item_id]].index(question)]

    dpg.ask(folder, questions, vqa, answers_path)
    whole = answers_path.read_bytes()
    assert dpg.read_answers(answers_path) == ANSWERS and len(asked) == 4 * 5
    asked.clear()
    answers_path.write_bytes(whole[:-9])  # killed while writing the last line
    dpg.ask(folder, questions, vqa, answers_path)
    assert answers_path.read_bytes() == whole and set(asked) == {"cat"}

    for mode, score in (("official", 37.5), ("corrected", 68.75)):
        assert dpg.main([f"--questions={csv_path}", f"--answers={answers_path}", f"--mode={mode}"]) == 0
        assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(score)
    (folder / "cat.png").write_bytes(b"no picture")
    answers_path.unlink()
    with pytest.raises(UserError, match="cannot read the image .*cat.png"):
        dpg.ask(folder, questions, vqa, answers_path)
    (folder / "cat.png").unlink()
    with pytest.raises(UserError, match="cat.png missing"):
        dpg.ask(folder, questions, vqa, answers_path)


def test_a_wrong_csv_is_refused_in_one_line(tmp_path, csv_path, capsys):
    csv_path.write_text(csv_path.read_text().replace("dependency", "parents"))
    assert dpg.main([f"--questions={csv_path}", "--answers=absent"]) == EXIT_USER_ERROR
    assert "no column 'dependency'" in capsys.readouterr().err
    csv_path.write_text(HEADER + ROWS[0].replace(",1,0,", ",1,none,"))
    with pytest.raises(UserError, match="data row 1"):
        dpg.read_questions(csv_path)


def test_prompts_come_from_json_lines_or_text_files(tmp_path):
    (tmp_path / "12.txt").write_text("a long prompt\n")
    assert dpg.read_prompts(tmp_path) == {"12": "a long prompt"}
    if SHARED_PROMPTS.exists():
        prompts = dpg.read_prompts(SHARED_PROMPTS)
        assert len(prompts) == 1065 and prompts["0"].startswith("An expansive field")
