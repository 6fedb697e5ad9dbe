"""Every command of docs/imagenet.md is one that the program accepts."""

import ast
import re
import runpy
import shlex

import pytest
from absl import flags

from tests.jobs.tiny import ROOT
from trm_diffusion import main
from trm_diffusion.config import resolve

COMMANDS = re.findall(r"^    python -m trm_diffusion.main (.*)$", (ROOT / "docs/imagenet.md").read_text(), re.MULTILINE)


def literal(value: str):
    names = {"true": True, "false": False}
    return ast.literal_eval(value) if value.isdigit() else names.get(value, value)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_recipe_is_accepted(command):
    given = dict(argument.removeprefix("--").split("=", 1) for argument in shlex.split(command))
    fields = {name.removeprefix("config."): given.pop(name) for name in list(given) if name.startswith("config.")}
    if "config" in given:
        path, _, argument = given["config"].partition(":")
        config = runpy.run_path(str(ROOT / path))["get_config"](argument)
        config.update_from_flattened_dict({name: literal(value) for name, value in fields.items()})
        resolve(config)
    for name, value in given.items():
        assert name in flags.FLAGS, name
        assert name != "mode" or value in main.MODES


def test_the_recipe_has_commands():
    assert len(COMMANDS) == 11
