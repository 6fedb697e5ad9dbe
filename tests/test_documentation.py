"""README and docs are true: every command is one that works, and every file they name is there."""

import re
from pathlib import Path

import pytest

from tests.commands import parsed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ {4}python -m trm_diffusion\.main (.*?)(?: {2,}#.*)?$", re.MULTILINE)
COMMANDS = [(page.name, command) for page in PAGES for command in COMMAND.findall(page.read_text())]
LINK = re.compile(r"\]\(([^):#]+)\)")
STANDS_FOR = {"CONFIG": "configs/digits.py"}  # of the capitals that readers fill in, those that must exist


@pytest.fixture(scope="module")
def outcomes():
    commands = [command for _, command in COMMANDS]
    for word, value in STANDS_FOR.items():
        commands = [re.sub(rf"\b{word}\b", value, command) for command in commands]
    return parsed([re.sub(r"\[(--[^]]*)\]", r"\1", command) for command in commands])


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_reaches_its_job(outcomes, index):
    code, text = outcomes[index]
    assert code == 0 and "reached" in text, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
