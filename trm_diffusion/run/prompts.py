"""Prompts of the user's, from a file or a folder."""

from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.metrics import dpg
from trm_diffusion.metrics.exports import read_json_lines


def read_prompts(path: str) -> list[str]:
    """The prompts in a file, one a line, or a JSON object with "prompt" a line (.jsonl), or in a folder of .txt files.

    Raises UserError where there are none.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"--prompts={path}: no such file; it holds one prompt a line")
    if file.is_dir():
        return list(dpg.read_prompts(path).values())
    if file.suffix == ".jsonl":
        prompts = [record["prompt"] for record in read_json_lines(path, ("prompt",))]
    else:
        prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--prompts={path} is empty, or not all text; it holds one prompt a line")
    return prompts
