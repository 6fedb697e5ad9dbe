"""Prompts from a file."""

import pytest

from trm_diffusion.errors import UserError
from trm_diffusion.run import prompts


def test_read_prompts(tmp_path):
    (tmp_path / "file").write_text("a red square\n\n a blue one \n")
    assert prompts.read_prompts(str(tmp_path / "file")) == ["a red square", "a blue one"]
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "none"):
        with pytest.raises(UserError, match=name):
            prompts.read_prompts(str(tmp_path / name))
