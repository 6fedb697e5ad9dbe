"""GenEval (Ghosh et al., 2023): checks exported images, and summarises results of the official evaluator.

`--mode=sample --export=geneval` draws the images. The official detector runs elsewhere, in its own environment.

    python -m trm_diffusion.metrics.geneval --prompts evaluation_metadata.jsonl --images DIR    # checks the export
    python -m trm_diffusion.metrics.geneval --results results.jsonl                             # official summary

each print one line of JSON. The layout that the official evaluator reads is

    DIR/00000/metadata.jsonl       the prompt's line of the prompt file
    DIR/00000/samples/0000.png     and 0001.png, 0002.png, 0003.png
"""

import argparse
import json
import pathlib
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from trm_diffusion.analysis.grids import save_png
from trm_diffusion.errors import UserError
from trm_diffusion.files import write_text
from trm_diffusion.metrics.exports import check_files, print_json
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import read_json_lines

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
IMAGES_PER_PROMPT = 4
NUM_PROMPTS = 553
RESULT = {"filename": str, "tag": str, "correct": bool, "metadata": object}  # form of a line of results


def read_prompts(path: str | pathlib.Path) -> list[dict]:
    """Reads the user's copy of `evaluation_metadata.jsonl`: {"tag", "include", "prompt", perhaps "exclude"} each.

    Raises:
      UserError: an unreadable file, a line without one of these keys, an unknown tag, or a prompt that is not text.
    """
    prompts = read_json_lines(path, {"tag": str, "include": list, "prompt": str})
    for where, prompt in prompts:
        if not prompt["prompt"].strip():
            raise UserError(f"{where}: the prompt is empty")
        if prompt["tag"] not in TASKS:
            raise UserError(f"{where}: tag {prompt['tag']!r} is none of {', '.join(TASKS)}")
    return [prompt for _, prompt in prompts]


def image_path(directory: str | pathlib.Path, prompt: int, image: int) -> pathlib.Path:
    """The path of image `image` of prompt `prompt`; both count from 0."""
    return local_path(directory) / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def metadata_path(directory: str | pathlib.Path, prompt: int) -> pathlib.Path:
    """The path of the copy of the prompt's line."""
    return local_path(directory) / f"{prompt:05d}" / "metadata.jsonl"


def write_metadata(directory: str | pathlib.Path, prompts: Sequence[dict], prompt: int) -> None:
    """Writes the prompt's line beside its images, unless it is there."""
    path, line = metadata_path(directory, prompt), json.dumps(prompts[prompt]) + "\n"
    if not path.exists() or path.read_bytes() != line.encode():
        write_text(path, line)


def write_image(
    directory: str | pathlib.Path, prompts: Sequence[dict], prompt: int, image: int, pixels: np.ndarray, mark: str = ""
) -> None:
    """Writes one image, uint8 [H, W, 3], with a mark as in `save_png`, and its prompt's metadata, each atomically."""
    write_metadata(directory, prompts, prompt)
    save_png(image_path(directory, prompt, image), pixels, mark)


def check_export(
    directory: str | pathlib.Path, prompts: Sequence[dict], images_per_prompt: int = IMAGES_PER_PROMPT
) -> dict:
    """Checks that every image of every prompt is there, with the right prompt beside it, and nothing else.

    Returns:
      {"num_prompts", "images_per_prompt", "num_images"}.

    Raises:
      UserError: names the missing file, the extra file, or the folder of another prompt.
    """
    folders = [f"{number:05d}" for number in range(len(prompts))]
    expected = {f"{folder}/metadata.jsonl" for folder in folders}
    for number in range(len(prompts)):
        paths = (image_path("", number, image) for image in range(images_per_prompt))
        expected |= {path.as_posix() for path in paths}
    check_files(directory, expected)
    for folder, prompt in zip(folders, prompts, strict=True):
        metadata = local_path(directory) / folder / "metadata.jsonl"
        if [record for _, record in read_json_lines(metadata)] != [prompt]:
            raise UserError(f"{metadata} is not the prompt {prompt['prompt']!r}: export into an empty directory")
    return {
        "num_prompts": len(prompts),
        "images_per_prompt": images_per_prompt,
        "num_images": len(prompts) * images_per_prompt,
    }


def summarise(results: Sequence[dict]) -> dict:
    """The official summary of the official evaluator's lines {"filename", "tag", "correct", "metadata", ...}.

    Returns:
      A dict for JSON:
        tasks: {tag: share of the task's images that are correct}.
        overall: the unweighted mean of the six tasks; None if one is missing.
        percent_correct_images: over all images.
        percent_correct_prompts: prompts with at least one correct image; equal metadata count as one prompt.
        num_images, num_prompts, official_size: counts, and whether they are the benchmark's 2,212 and 553.

    Raises:
      UserError: a duplicate image, an unknown tag, or `correct` that is not a bool.
    """
    by_task, by_prompt = defaultdict(list), defaultdict(list)
    filenames = set()
    for number, result in enumerate(results, start=1):
        if result["filename"] in filenames:
            raise UserError(
                f"result {number}: {result['filename']} appears twice; was the evaluator run twice into one file?"
            )
        if result["tag"] not in TASKS:
            raise UserError(f"result {number}: tag {result['tag']!r} is none of {', '.join(TASKS)}")
        if not isinstance(result["correct"], bool):
            raise UserError(f"result {number}: correct is {result['correct']!r}, not true or false")
        filenames.add(result["filename"])
        by_task[result["tag"]].append(result["correct"])
        by_prompt[json.dumps(result["metadata"])].append(result["correct"])
    tasks = {task: float(np.mean(by_task[task])) for task in TASKS if task in by_task}
    return {
        "tasks": tasks,
        "overall": sum(tasks.values()) / len(TASKS) if len(tasks) == len(TASKS) else None,
        "percent_correct_images": 100 * sum(map(sum, by_task.values())) / len(results),
        "percent_correct_prompts": 100 * float(np.mean([any(correct) for correct in by_prompt.values()])),
        "num_images": len(results),
        "num_prompts": len(by_prompt),
        "official_size": (len(results), len(by_prompt)) == (NUM_PROMPTS * IMAGES_PER_PROMPT, NUM_PROMPTS),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trm_diffusion.metrics.geneval", description=__doc__.split("\n")[0])
    parser.add_argument("--results", help="result lines of the official evaluator to summarise")
    parser.add_argument("--prompts", help="evaluation_metadata.jsonl; needs --images")
    parser.add_argument("--images", help="an export to check against --prompts")
    options = parser.parse_args(arguments)
    if bool(options.results) == bool(options.images) or bool(options.images) != bool(options.prompts):
        parser.error("give either --results, or both --prompts and --images")
    if options.results:
        return print_json(lambda: summarise([record for _, record in read_json_lines(options.results, RESULT)]))
    return print_json(lambda: check_export(options.images, read_prompts(options.prompts)))


if __name__ == "__main__":
    sys.exit(main())
