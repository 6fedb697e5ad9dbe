"""Reads the user's prompts from a file or a folder."""

from trm_diffusion.errors import UserError
from trm_diffusion.metrics import dpg
from trm_diffusion.readers.paths import any_path
from trm_diffusion.readers.records import read_json_lines
from trm_diffusion.readers.text import read_lines


def read_prompts(path: str) -> list[str]:
    """Prompts of a text file (one per line), a .jsonl file (one "prompt" per line) or a folder of .txt files.

    Raises UserError if there are none.
    """
    file = any_path(path, "--prompts")
    if not file.exists():
        raise UserError(f"--prompts={path}: no such file; give a file with one prompt per line")
    if file.is_dir():
        return list(dpg.read_prompts(path).values())
    if file.suffix == ".jsonl":
        prompts = [record["prompt"] for _, record in read_json_lines(file, {"prompt": str})]
    else:
        prompts = [line.strip() for line in read_lines(file) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={path} is empty; give one prompt per line")
    return prompts
