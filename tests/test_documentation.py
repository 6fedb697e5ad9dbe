"""README and docs are right: every command reaches its job, and every file they name exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.commands import parsed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*.md"))]
COMMAND = re.compile(r"^ {4}python -m trm_diffusion\.main (.*?)(?: {2,}#.*)?$", re.MULTILINE)
COMMANDS = [(page.name, command) for page in PAGES for command in COMMAND.findall(page.read_text())]
LAUNCH = re.compile(r"^ {4}bash (launch/(?:tpu_vm|xpk|slurm|geneval)\.sh .*?)(?: {2,}#.*)?$", re.MULTILINE)
LAUNCHES = [command for page in PAGES for command in LAUNCH.findall(page.read_text())]
BENCHMARK = re.compile(r"benchmarks[./](\w+)")
LINK = re.compile(r"\]\(([^):#]+)\)")
SOURCE_FILE = re.compile(r"[\w./]+/\w+\.(?:py|sh)\b")  # as in `models/recursion/layer.py`
STANDS_FOR = {"CONFIG": "configs/digits.py"}  # placeholders for readers, replaced by a file that must exist


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


@pytest.mark.parametrize("command", LAUNCHES)
def test_a_launch_script_takes_its_flags(command):
    script, name, *arguments = shlex.split(command)
    result = subprocess.run(
        ["bash", script, name, "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and result.stdout, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_are_there(page):
    for name in BENCHMARK.findall(page.read_text()):
        assert name == "NAME" or (ROOT / f"benchmarks/{name}.py").exists(), f"{page.name} names benchmark {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_are_there(page):
    """A path is relative to the repository or to the package."""
    for name in SOURCE_FILE.findall(page.read_text()):
        assert any((root / name).exists() for root in (page.parent, ROOT, ROOT / "trm_diffusion")), name


def test_layout_names_what_is_there():
    layout = (ROOT / "README.md").read_text().split("## Layout")[1].split("##")[0]
    listed = re.findall(r"^ {4}(\S+)", layout, re.MULTILINE)
    assert len(listed) > 15 and not [name for name in listed if not (ROOT / name).exists()]
    folders = {f"trm_diffusion/{path.parent.name}/" for path in (ROOT / "trm_diffusion").glob("*/__init__.py")}
    assert folders <= set(listed)
