"""Reads the user's prompts from a file or a folder."""

from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.metrics import dpg
from trm_diffusion.metrics.exports import read_json_lines


def read_prompts(path: str) -> list[str]:
    """Prompts of a text file (one per line), a .jsonl file (one "prompt" per line) or a folder of .txt files.

    Raises UserError if there are none.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"--prompts={path}: no such file; give a file with one prompt per line")
    if file.is_dir():
        return list(dpg.read_prompts(path).values())
    if file.suffix == ".jsonl":
        prompts = [record["prompt"] for record in read_json_lines(path, ("prompt",))]
    else:
        prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--prompts={path} is empty or has a prompt that is not text; give one prompt per line")
    return prompts
