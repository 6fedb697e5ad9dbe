"""DPG-Bench (Hu et al., 2024, with ELLA): writes image grids, and scores a VQA model's answers about them.

    python -m trm_diffusion.metrics.dpg --questions dpg_bench.csv --answers answers.jsonl [--mode official]
                                        [--images DIR --vqa MODEL]

prints the scores as one line of JSON. With --images and --vqa, it first asks the model the questions that
`answers.jsonl` does not answer yet; --vqa is a local path or a hub id for the `transformers` library (see
`metrics/vqa.py`). DIR has one <item_id>.png per prompt, a grid of four images; crops are numbered top left, top right,
bottom left, bottom right.

An answer that is exactly "yes" scores 1, any other 0. In each crop, in the order of the CSV, a question also scores 0
if one of its parents does. A crop scores the mean of its questions, an image the mean of its crops, and the total is
the mean of the images, times 100. Categories pool questions: L2 is the text of the tuple before "(", L1 that before
" - ".

    official    as in the reference script, including its mistakes: the first row of the CSV is ignored; the
                categories use only the last crop, before zeroing; an image that the script cannot score (it is
                missing, or a question's parent is, such as that first row) is left out.
    corrected   all rows; all crops, after zeroing; a missing image or parent is an error.
"""

import argparse
import csv
import dataclasses
import io
import json
import pathlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from trm_diffusion.analysis.grids import save_png
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.exports import check_files, print_json
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.images import read_image
from trm_diffusion.readers.opening import read_bytes
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import parse, read_json_lines
from trm_diffusion.readers.text import decode, read_text, split_lines

CROPS = 4
MODES = ("official", "corrected")
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")

ANSWER = {"item_id": str, "answers": [[str]]}  # form of a line of answers
Answers = dict[str, list[list[str]]]  # {item_id: [crop][question, in the order of the CSV]}


@dataclasses.dataclass(frozen=True)
class Question:
    number: int  # proposition_id, unique within its item
    parents: tuple[int, ...]
    category: str  # L2
    text: str
    row: int  # of the CSV's data, from 0


def read_questions(path: str | pathlib.Path) -> dict[str, list[Question]]:
    """Reads the user's copy of dpg_bench.csv: {item_id: its questions}, both in the order of the file.

    Raises:
      UserError: an unreadable file, a missing column, or numbers that are invalid.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path)))
        lines = list(reader)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not CSV ({error}); give the benchmark's dpg_bench.csv"
        ) from None
    absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}; give the benchmark's dpg_bench.csv")
    questions = defaultdict(list)
    for row, line in enumerate(lines):
        empty = [column for column in _COLUMNS if not isinstance(line[column], str)]
        if empty:
            raise UserError(f"{path}, data row {row + 1}: no {empty[0]}; is the file cut off?")
        try:
            number = int(line["proposition_id"])
            parents = tuple(int(parent) for parent in line["dependency"].split(",") if int(parent))
        except ValueError:
            raise UserError(
                f"{path}, data row {row + 1}: proposition_id and dependency must be whole numbers"
            ) from None
        category = line["tuple"].split("(")[0].strip()
        questions[line["item_id"]].append(Question(number, parents, category, line["question_natural_language"], row))
    if not questions:
        raise UserError(f"{path} holds no questions")
    return dict(questions)


def read_prompts(path: str | pathlib.Path) -> dict[str, str]:
    """Reads {item_id: prompt} from a folder of <item_id>.txt, or from JSON lines {"item_id", "prompt"}.

    Raises:
      UserError: no prompts, a prompt that is not text, or item ids that are duplicates or cannot name files.
    """
    path = local_path(path)
    if path.is_dir():
        pairs = [(name[: -len(".txt")], read_text(path / name).strip()) for name in list_files(path, [".txt"])]
        if not pairs:
            raise UserError(f"{path} holds no <item_id>.txt")
    else:
        form = {"item_id": str | int, "prompt": str}
        pairs = [(str(record["item_id"]), record["prompt"]) for _, record in read_json_lines(path, form)]
    for number, (item_id, prompt) in enumerate(pairs):
        if not prompt.strip():
            raise UserError(f"{path}, prompt {number}: prompt {prompt!r} of item {item_id} is empty")
        if not re.fullmatch(r"\w[\w.-]*", item_id):
            raise UserError(f"{path}, prompt {number}: item_id {item_id!r} cannot name a file")
    prompts = dict(pairs)
    if len(prompts) < len(pairs):
        raise UserError(f"{path}: {len(pairs) - len(prompts)} of its item ids appear twice")
    return prompts


def make_grid(images: np.ndarray) -> np.ndarray:
    """Joins four images [4, H, W, 3] to one [2 H, 2 W, 3]: top left, top right, bottom left, bottom right."""
    if len(images) != CROPS:
        raise ValueError(f"a grid needs {CROPS} images, not {len(images)}")
    return np.concatenate([np.concatenate(row, axis=1) for row in (images[:2], images[2:])])


def split_grid(grid: np.ndarray) -> np.ndarray:
    """The inverse of `make_grid`."""
    height, width, channels = grid.shape
    if height % 2 or width % 2:
        raise UserError(f"a grid of {height} x {width} pixels cannot be cut into 2 x 2 equal images")
    rows = grid.reshape(2, height // 2, 2, width // 2, channels)
    return rows.transpose(0, 2, 1, 3, 4).reshape(CROPS, height // 2, width // 2, channels)


def write_grid(directory: str | pathlib.Path, item_id: str, images: np.ndarray, mark: str = "") -> None:
    """Writes the grid of uint8 images [4, H, W, 3] as <item_id>.png, atomically, with a mark as in `save_png`."""
    save_png(local_path(directory) / f"{item_id}.png", make_grid(images), mark)


def check_export(directory: str | pathlib.Path, item_ids: Iterable[str]) -> None:
    """Raises UserError, naming a missing or an extra image."""
    check_files(directory, {f"{item_id}.png" for item_id in item_ids})


def ask(
    directory: str | pathlib.Path,
    questions: dict[str, list[Question]],
    vqa: Callable[[np.ndarray, str], str],
    answers_path: str | pathlib.Path,
) -> None:
    """Asks `vqa(crop, question)` about every crop, uint8 [H, W, 3], of every image; appends one line per item.

    Items already in `answers_path` are skipped, so an interrupted run continues where it stopped; a last line that
    the interruption cut off is dropped.
    """
    check_export(directory, questions)
    path = local_path(answers_path, "--answers")
    written, newline, _ = read_bytes(path).rpartition(b"\n") if path.exists() else (b"", b"", b"")
    lines = enumerate(split_lines(decode(written, str(path))), start=1)
    done = {parse(line, ANSWER, f"{path}, line {number}")["item_id"] for number, line in lines}
    with path.open("ab") as file:
        file.truncate(len(written + newline))
        for item_id, asked in questions.items():
            if item_id in done:
                continue
            crops = split_grid(np.asarray(read_image(local_path(directory) / f"{item_id}.png", 3)))
            answers = [[vqa(crop, question.text) for question in asked] for crop in crops]
            file.write(json.dumps({"item_id": item_id, "answers": answers}).encode() + b"\n")
            file.flush()


def read_answers(path: str | pathlib.Path) -> Answers:
    """Reads the answers that `ask` wrote."""
    return {record["item_id"]: record["answers"] for _, record in read_json_lines(path, ANSWER)}


def score_crop(questions: Sequence[Question], answers: Sequence[str]) -> tuple[list[float], list[float]]:
    """Scores of the questions, before and after zeroing those with a parent at 0; in order, so that zeros cascade.

    Raises:
      KeyError: a parent that is not among the questions.
    """
    before = {question.number: float(answer == "yes") for question, answer in zip(questions, answers, strict=True)}
    after = dict(before)
    for question in questions:
        # any() stops at the first zero, as in the reference: a missing parent after it is no error.
        if any(after[parent] == 0 for parent in question.parents):
            after[question.number] = 0.0
    return list(before.values()), list(after.values())


def aggregate(questions: dict[str, list[Question]], answers: Answers, mode: str) -> dict:
    """Scores answers as described in the module's docstring.

    Returns:
      A dict for JSON: {"mode", "score": 0 .. 100, "l1", "l2": {category: 0 .. 100}, "num_images", "dropped":
      item ids that were left out}.

    Raises:
      UserError: answers that do not match the questions; in mode corrected, missing images or parents.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is none of {MODES}")
    _check_answers(questions, answers)
    images, dropped = [], []
    pooled = defaultdict(list)
    for item_id, asked in questions.items():
        kept = [i for i, question in enumerate(asked) if mode == "corrected" or question.row > 0]
        asked = [asked[i] for i in kept]
        try:
            if not asked:  # the first row of the CSV was this item's only question
                raise KeyError(item_id)
            crops = [score_crop(asked, [answers_of_crop[i] for i in kept]) for answers_of_crop in answers[item_id]]
        except KeyError as error:
            if mode == "corrected":
                reason = "no answers" if item_id not in answers else f"a question whose parent {error} is absent"
                raise UserError(f"item {item_id} has {reason}: complete the answers and the CSV") from None
            dropped.append(item_id)
            continue
        images.append(np.mean([after for _, after in crops]))
        counted = crops[-1][:1] if mode == "official" else [after for _, after in crops]
        for scores in counted:
            for question, score in zip(asked, scores, strict=True):
                pooled[question.category].append(score)
    if not images:
        raise UserError("none of the items could be scored: do the answers belong to these questions?")
    l1 = defaultdict(list)
    for category, scores in pooled.items():
        l1[category.split(" - ")[0]] += scores
    return {
        "mode": mode,
        "score": 100 * float(np.mean(images)),
        "l1": {category: 100 * float(np.mean(scores)) for category, scores in sorted(l1.items())},
        "l2": {category: 100 * float(np.mean(scores)) for category, scores in sorted(pooled.items())},
        "num_images": len(images),
        "dropped": dropped,
    }


def _check_answers(questions: dict[str, list[Question]], answers: Answers) -> None:
    for item_id, crops in answers.items():
        if item_id not in questions:
            raise UserError(f"there are answers for item {item_id}, but the CSV has no questions about it")
        if len(crops) != CROPS or any(len(crop) != len(questions[item_id]) for crop in crops):
            raise UserError(f"item {item_id} needs {CROPS} crops of {len(questions[item_id])} answers each")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trm_diffusion.metrics.dpg", description=__doc__.split("\n")[0])
    parser.add_argument("--questions", required=True, help="dpg_bench.csv")
    parser.add_argument("--answers", required=True, help="JSON lines of answers; read, and written with --vqa")
    parser.add_argument("--mode", choices=MODES, default="corrected")
    parser.add_argument("--images", help="the folder of <item_id>.png; needs --vqa")
    parser.add_argument("--vqa", help="a visual question answering model: local path or hub id")
    options = parser.parse_args(arguments)
    if bool(options.images) != bool(options.vqa):
        parser.error("--images and --vqa must be given together")

    def compute() -> dict:
        questions = read_questions(options.questions)
        if options.vqa:
            from trm_diffusion.metrics.vqa import TransformersVqa

            ask(options.images, questions, TransformersVqa(options.vqa), options.answers)
        return aggregate(questions, read_answers(options.answers), options.mode)

    return print_json(compute)


if __name__ == "__main__":
    sys.exit(main())
