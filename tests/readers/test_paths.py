"""Paths in flags and fields: `~` is the home directory, a bucket is one line where it cannot be read."""

import os
from pathlib import Path

import pytest

from tests.commands import ROOT, parsed, ran
from trm_diffusion.config import default_config, resolve, rules
from trm_diffusion.config.resolve import fields_of
from trm_diffusion.errors import UserError
from trm_diffusion.flags import PATHS
from trm_diffusion.readers.paths import any_path, expand, local_path

HOME = os.path.expanduser("~")
PATH_FIELDS = (
    "data.path", "data.text", "data.vae", "init.workdir", "init.adapter", "model.text.pretrained"
)  # fmt: skip


def test_home_relative_absolute_and_buckets():
    assert expand("~/x") == f"{HOME}/x"
    assert [expand(same) for same in ("", "a/~b", "../x", "owner/id")] == ["", "a/~b", "../x", "owner/id"]
    assert local_path("~/x") == Path(HOME, "x") and str(any_path("~/x")) == f"{HOME}/x"
    for call in (local_path, any_path):
        with pytest.raises(UserError, match="^--to=gs://bucket/x"):  # the package of the bucket is not installed
            call("gs://bucket/x", "--to")
        for value in ("gs:/bucket/x", "http://host/x", "~nobody-of-this-name/x", "a\0b"):
            with pytest.raises(UserError):
                call(value)


def test_every_path_field_is_expanded(monkeypatch):
    monkeypatch.setattr(rules, "check", lambda config: None)  # of what does not go together
    assert {name for name, field in fields_of() if field.metadata.get("path")} == {f"config.{p}" for p in PATH_FIELDS}
    config = default_config()
    config.update_from_flattened_dict(dict.fromkeys(PATH_FIELDS, "~/x"))
    resolved = resolve(config)
    for name in PATH_FIELDS:
        value = resolved
        for part in name.split("."):
            value = getattr(value, part)
        assert value == f"{HOME}/x", name
    config.data.path = "https://host/x"
    with pytest.raises(UserError, match="^config.data.path=https://host/x is neither"):
        resolve(config)


def test_every_path_flag_is_read_by_the_same_function(tmp_path):
    modes = dict.fromkeys(PATHS, "convert") | {
        "prompts": "sample", "context": "sample", "images": "evaluate", "compilation_cache": "train"
    }  # fmt: skip
    results = parsed([f"--mode={modes[name]} --{name}=ftp://host/x" for name in PATHS])
    for name, (code, text) in zip(PATHS, results, strict=True):
        assert code == 2 and f"error: --{name}=ftp://host/x is neither" in text, text


def test_jobs_on_local_files_refuse_buckets():
    commands = [
        "python -m trm_diffusion.main --config=configs/digits.py --mode=prepare --out=gs://bucket/latents",
        "python -m trm_diffusion.main --config=configs/digits.py --workdir=gs://bucket/run",
    ]
    for code, text in ran(commands, ROOT):
        assert code == 2 and "error: --" in text and "gs://bucket" in text and "Traceback" not in text, text
