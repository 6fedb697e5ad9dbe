"""GenEval: the official summary, checked by hand, and exports that must be complete."""

import json
import pathlib

import numpy as np
import pytest

from trm_diffusion.errors import EXIT_USER_ERROR, UserError
from trm_diffusion.metrics import geneval

SHARED_PROMPTS = pathlib.Path(__file__).parents[2].parent / "shared/data/geneval_evaluation_metadata.jsonl"
PROMPTS = [{"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": f"a photo {i}"} for i in range(3)]


def _result_lines() -> list[dict]:
    """2,212 results: {task: (prompts, prompts with correct images, correct images in each of these)}."""
    tasks = {
        "single_object": (80, 80, 4),
        "two_object": (99, 99, 1),
        "counting": (80, 40, 2),
        "colors": (94, 0, 0),
        "position": (100, 25, 4),
        "color_attr": (100, 50, 1),
    }
    lines = []
    for task, (prompts, good_prompts, good_images) in tasks.items():
        for prompt in range(prompts):
            text = f"a photo of {task} {prompt}"
            for image in range(4):
                correct = prompt < good_prompts and image < good_images
                record = {"filename": f"{task}/{prompt:05d}/samples/{image:04d}.png", "tag": task, "prompt": text}
                record |= {"correct": correct, "reason": "", "metadata": json.dumps({"prompt": text}), "details": "{}"}
                lines.append(record)
    return lines


def test_the_summary_is_the_official_one(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in _result_lines()))
    assert geneval.main([f"--results={path}"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["tasks"] == {
        "single_object": 320 / 320,
        "two_object": 99 / 396,
        "counting": 80 / 320,
        "colors": 0 / 376,
        "position": 100 / 400,
        "color_attr": 50 / 400,
    }
    assert summary["overall"] == pytest.approx(0.3125)  # (1 + 1/4 + 1/4 + 0 + 1/4 + 1/8) / 6
    assert summary["percent_correct_images"] == pytest.approx(100 * 649 / 2212)  # 320 + 99 + 80 + 0 + 100 + 50
    assert summary["percent_correct_prompts"] == pytest.approx(100 * 294 / 553)  # 80 + 99 + 40 + 0 + 25 + 50
    assert summary["official_size"] and summary["num_images"] == 2212 and summary["num_prompts"] == 553


def test_a_part_of_the_benchmark_is_not_passed_off_as_the_whole():
    lines = [line for line in _result_lines() if line["tag"] != "position"]
    summary = geneval.summarise(lines)
    assert summary["overall"] is None and not summary["official_size"] and summary["tasks"]["two_object"] == 0.25


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines.append(lines[0]), "appears twice"),
        (lambda lines: lines[1].update(tag="colour"), "'colour' is none of"),
        (lambda lines: lines[2].update(correct="True"), "correct is 'True'"),
        (lambda lines: lines[3].pop("metadata"), "line 4: metadata is missing"),
        (lambda lines: lines.clear(), "holds no records"),
    ],
)
def test_broken_results_are_refused_in_one_line(tmp_path, capsys, change, says):
    lines = _result_lines()
    change(lines)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert geneval.main([f"--results={path}"]) == EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not printed.out


def _export(directory: pathlib.Path) -> None:
    for prompt in range(len(PROMPTS)):
        for image in range(4):
            pixels = np.full((4, 4, 3), 10 * prompt + image, np.uint8)
            geneval.write_image(directory, PROMPTS, prompt, image, pixels)


def test_an_export_has_the_official_layout(tmp_path):
    from PIL import Image

    _export(tmp_path)
    assert geneval.check_export(tmp_path, PROMPTS)["num_images"] == 12
    assert json.loads((tmp_path / "00002/metadata.jsonl").read_text()) == PROMPTS[2]
    with Image.open(tmp_path / "00002/samples/0001.png") as image:
        assert np.asarray(image).tolist() == np.full((4, 4, 3), 21).tolist()
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    (tmp_path / "00001/samples/0003.png").unlink()
    (tmp_path / "00002/metadata.jsonl").write_text("{}")
    _export(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == whole


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: (root / "00001/samples/0003.png").unlink(), "00001/samples/0003.png missing"),
        (lambda root: (root / "00001/samples/0004.png").touch(), "00001/samples/0004.png not part of the export"),
        (lambda root: (root / "00003").mkdir() or (root / "00003/a.png").touch(), "00003/a.png not part"),
        (lambda root: (root / "00000/metadata.jsonl").write_text('{"prompt": "other"}'), "is not the prompt"),
        (lambda root: [path.unlink() for path in root.rglob("*.png")], "0000.png and 11 more missing"),
    ],
)
def test_an_export_with_a_missing_or_an_extra_file_is_refused(tmp_path, spoil, says):
    _export(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=says):
        geneval.check_export(tmp_path, PROMPTS)


@pytest.mark.skipif(not SHARED_PROMPTS.exists(), reason="the benchmark's prompt file is not at hand")
def test_the_benchmarks_prompt_file_is_read():
    prompts = geneval.read_prompts(SHARED_PROMPTS)
    assert len(prompts) == geneval.NUM_PROMPTS
    counts = [sum(prompt["tag"] == task for prompt in prompts) for task in geneval.TASKS]
    assert counts == [80, 99, 80, 94, 100, 100]


def test_a_wrong_prompt_file_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"tag": "colors", "include": [], "prompt": "a"}\n{"tag": "colors", "inclu')
    with pytest.raises(UserError, match="line 2: not JSON"):
        geneval.read_prompts(path)
    with pytest.raises(UserError, match="No such file"):
        geneval.read_prompts(tmp_path / "absent.jsonl")
