"""Extensions need only the files and lines that README names: each is added to a copy of the package and run.

A test adds what a user would add, runs one command line that uses it, and checks the result and the changed files.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
NEW = "new"  # marks a file that the package does not have
TINY = (
    "--config=configs/digits.py",
    "--workdir=run",
    "--compilation_cache=none",
    "--config.model.depth=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.patch=4",
    "--config.model.recursion.blocks=none",
    "--config.train.updates=2",
    "--config.train.batch_size=8",
    "--config.optim.warmup_steps=1",
    "--config.log.every=1",
    "--config.log.samples_every=0",
    "--config.log.tensorboard=false",
    "--config.sample.sampler=euler",
    "--config.sample.diffusion_steps=2",
    "--config.sample.guidance=1.0",
    "--config.sample.per_class=1",
    "--config.sample.batch_size=10",
    "--config.evaluate.kind=none",
)


class Checkout:
    """A copy of the package and its experiments, for a test to extend."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name in ("trm_diffusion", "configs"):
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))

    def add_file(self, path: str, text: str) -> None:
        assert not (self.directory / path).exists()
        (self.directory / path).write_text(text)

    def add_line(self, path: str, line: str, *, after: str) -> None:
        """Adds a line below the line `after`, which must occur once."""
        file = self.directory / path
        lines = file.read_text().splitlines()
        assert lines.count(after) == 1, f"{path} has {lines.count(after)} lines {after!r}"
        lines.insert(lines.index(after) + 1, line)
        file.write_text("\n".join(lines) + "\n")

    def changes(self) -> dict[str, str]:
        """{path: NEW or "+LINES -LINES"} of every file that differs from the package."""
        found = {}
        for path in sorted(file for file in self.directory.rglob("*") if file.is_file()):
            name = path.relative_to(self.directory).as_posix()
            if not name.startswith(("trm_diffusion/", "configs/")) or path.suffix == ".pyc":
                continue
            if not (ROOT / name).exists():
                found[name] = NEW
            elif path.read_bytes() != (ROOT / name).read_bytes():
                texts = ((ROOT / name).read_text().splitlines(), path.read_text().splitlines())
                marks = [line[0] for line in difflib.ndiff(*texts)]
                found[name] = f"+{marks.count('+')} -{marks.count('-')}"
        return found

    def run(self, *flags: str) -> Path:
        """Trains digits for two updates and draws a grid with the extended package; returns the run's directory.

        flags: appended to TINY, which they override.
        """
        process = subprocess.run(
            [sys.executable, "-m", "trm_diffusion.main", *TINY, *flags],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        (workdir,) = [flag.partition("=")[2] for flag in [*TINY, *flags] if flag.startswith("--workdir=")][-1:]
        return self.directory / workdir


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


THRESHOLDED = '''"""Static thresholding: DDIM whose predicted data are clipped to the range of the data."""

import jax.numpy as jnp

from trm_diffusion.diffusion.samplers.base import SingleEvaluationSampler


class Thresholded(SingleEvaluationSampler):
    def update(self, noisy, prediction, times, next_times, draw_noise):
        return self.objective.perturb(jnp.clip(prediction.clean, -1.0, 1.0), prediction.noise, next_times)
'''


def test_a_sampler_is_one_file_and_one_line(checkout):
    samplers = "trm_diffusion/diffusion/samplers"
    checkout.add_file(f"{samplers}/thresholded.py", THRESHOLDED)
    checkout.add_line(
        f"{samplers}/__init__.py",
        '    "thresholded": "trm_diffusion.diffusion.samplers.thresholded:Thresholded",',
        after="SAMPLERS = {  # `sample.sampler`: its class",
    )
    workdir = checkout.run("--config.sample.sampler=thresholded")
    images = np.load(workdir / "samples" / "grid_0000002.npz")["images"]
    # An almost untrained network leaves the noise unchanged: without the new sampler, values reach 3.
    assert images.shape == (10, 8, 8, 1) and images.min() == -1.0 and images.max() == 1.0
    assert checkout.changes() == {f"{samplers}/thresholded.py": NEW, f"{samplers}/__init__.py": "+1 -0"}


CONTRAST = '''"""The contrast of generated images, a metric of one number."""

from trm_diffusion.metrics.judges import Evaluation, Judge, Picture


class ContrastJudge(Judge):
    sources = ("digits",)
    condition = "label"

    def evaluate(self, generate):
        images = generate(self.labels())
        contrast = float(images.max() - images.min())
        return Evaluation({"contrast": contrast}, contrast > 1.0, {"contrast": Picture(images[: self.per_class])})
'''


def test_a_metric_is_one_file_and_one_line(checkout):
    checkout.add_file("trm_diffusion/metrics/contrast.py", CONTRAST)
    checkout.add_line(
        "trm_diffusion/metrics/judges.py",
        '    "contrast": "trm_diffusion.metrics.contrast:ContrastJudge",',
        after="JUDGES = {  # `evaluate.kind`: its class",
    )
    workdir = checkout.run("--config.evaluate.kind=contrast", "--config.evaluate.num_samples=10")
    report = json.loads((workdir / "evaluation.json").read_text())
    images = np.load(workdir / "samples" / "grid_0000002.npz")["images"]
    # The grid and the evaluation draw the same images: one of each class, at the same indices.
    assert report["contrast"] == pytest.approx(float(images.max() - images.min()))
    assert report["pass"] is True and report["protocol"]["samples"] == 10
    assert (workdir / "samples" / "contrast.png").exists()
    assert checkout.changes() == {"trm_diffusion/metrics/contrast.py": NEW, "trm_diffusion/metrics/judges.py": "+1 -0"}


STRIPES = (ROOT / "tests/data/stripes.py").read_text()


def test_a_data_source_is_one_file_and_one_line(checkout):
    checkout.add_file("trm_diffusion/data/stripes.py", STRIPES)
    checkout.add_line(
        "trm_diffusion/data/registry.py",
        '    "stripes": "trm_diffusion.data.stripes:StripesSource",',
        after="SOURCES = {  # `data.source`: its class",
    )
    flags = ("--config.data.source=stripes", "--config.data.image_size=4", "--config.data.num_classes=2")
    workdir = checkout.run(*flags, "--config.train.batch_size=2")
    arrays = np.load(workdir / "samples" / "grid_0000002.npz")
    assert arrays["images"].shape == (2, 4, 4, 1) and arrays["labels"].tolist() == [0, 1]
    assert checkout.changes() == {"trm_diffusion/data/stripes.py": NEW, "trm_diffusion/data/registry.py": "+1 -0"}


def test_a_reading_of_the_mechanism_is_a_field_and_a_branch(checkout):
    """The state is averaged, a_t = (a_{t-1} + Attn(q, k, v) + x~) / 2."""
    recursion = "trm_diffusion/models/recursion"
    checkout.add_line(
        f"{recursion}/config.py",
        "    averaged: bool = False",
        after="    modulation: bool = True  # Mod is the block's shift and scale; False leaves it out",
    )
    checkout.add_line(
        f"{recursion}/layer.py",
        "            if config.averaged:\n                a_bnd = (a_bnd + state.a_bnd) / 2",
        after='            a_bnd = attended + x_bnd if config.residual == "before_norm" else attended',
    )
    flags = ["--config.model.recursion.blocks=all", "--config.model.recursion.latent_steps=4"]
    flags += ["--config.model.recursion.base_every_step=true", "--config.model.recursion.base_input=carry"]
    images = {}
    for averaged in (False, True):
        workdir = checkout.run(*flags, f"--config.model.recursion.averaged={averaged}", f"--workdir={averaged}")
        images[averaged] = np.load(workdir / "samples" / "grid_0000002.npz")["images"]
        config = json.loads((workdir / "config.json").read_text())["config"]
        assert config["model"]["recursion"]["averaged"] is averaged
    assert np.abs(images[True] - images[False]).max() > 1e-6
    assert checkout.changes() == {f"{recursion}/config.py": "+1 -0", f"{recursion}/layer.py": "+2 -0"}
