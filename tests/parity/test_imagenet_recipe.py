"""The conversion commands of docs/imagenet.md as written, including those of PyTorch files, in miniature."""

import torch

from tests.commands import ran
from tests.recipe import COMMANDS, job, miniature, without_torch, write_inputs


def test_conversions(tmp_path):
    """They give the same bytes as from .safetensors, with which tests/jobs/test_imagenet_recipe.py continues."""
    write_inputs(
        tmp_path, lambda path, tensors: torch.save({name: torch.from_numpy(t) for name, t in tensors.items()}, path)
    )
    conversions = [command for command in miniature() if job(command) == "convert"]
    changed = [command for command in COMMANDS if without_torch(command) != command]
    assert len(changed) == 2 and all(job(command) == "convert" for command in changed)
    others = [without_torch(command).replace("--to=", "--to=others/") for command in conversions]
    for command, (code, text) in zip(conversions + others, ran(conversions + others, tmp_path), strict=True):
        assert code == 0, f"{command}\n{text[-3000:]}"
    for name in ("sd_vae", "dit_xl_2", "inception"):
        weights = [tmp_path / place / name / "model.safetensors" for place in ("weights", "others/weights")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
