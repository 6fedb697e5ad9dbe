"""Runs written by older code: their state restores to the bit, they draw the same images, and training resumes.

tests/fixtures/make_format_1.py describes the runs.
"""

import dataclasses
import hashlib
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from trm_diffusion.config import Config
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.run.restore import load_run
from trm_diffusion.run.workdir import load_config
from trm_diffusion.runtime.signals import StopRequest

FORMAT_1 = Path(__file__).parents[1] / "fixtures" / "format_1"
RUNS = ("digits", "words", "encoded")
PIXELS_ATOL = 2e-5  # for CPUs and compiler options that differ from those of the fixture


def hashes_of(state) -> dict[str, str]:
    """SHA-256 of type, shape and bytes of every array of a training state, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {"/".join(map(_name, path)): _hash(np.asarray(leaf)) for path, leaf in leaves}


def _name(entry) -> str:
    return str(next(getattr(entry, kind) for kind in ("key", "name", "idx") if hasattr(entry, kind)))


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


def drawn(config: Config, workdir: epath.Path, prompts: Sequence[str] = ()) -> np.ndarray:
    """The images that the sampling job writes."""
    sample(config, workdir, StopRequest(), prompts)
    (path,) = (workdir / "samples").glob("*.npz")
    return np.load(path)["images"]


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A copy of a run: (config, workdir, expected arrays)."""
    directory = tmp_path_factory.mktemp("format_1") / request.param
    shutil.copytree(FORMAT_1 / request.param, directory)
    for packed in list(directory.rglob("*.tar.xz")):
        with tarfile.open(packed) as archive:
            archive.extractall(packed.parent, filter="data")
        packed.unlink()
    workdir = epath.Path(directory / "run")
    config = load_config(workdir)
    if config.data.text:
        data = dataclasses.replace(config.data, path=str(directory / "images"), text=str(directory / "texts"))
        config = dataclasses.replace(config, data=data)
    with np.load(directory / "expected.npz") as arrays:
        return config, workdir, dict(arrays)


def test_the_state_is_the_same_to_the_bit(run):
    config, workdir, expected = run
    hashes = dict(zip(expected["names"].tolist(), expected["sha256"].tolist(), strict=True))
    assert hashes_of(load_run(config, workdir)[1]) == hashes


def test_it_draws_the_same_images(run):
    config, workdir, expected = run
    images = drawn(config, workdir, expected.get("prompts", np.array([])).tolist())
    assert np.ptp(expected["images"]) > 0.5
    np.testing.assert_allclose(images, expected["images"], rtol=0, atol=PIXELS_ATOL)


def test_training_goes_on(run, tmp_path):
    config, old, _ = run
    workdir = epath.Path(tmp_path) / "run"
    shutil.copytree(old, workdir)
    before = load_run(config, workdir)[1]
    updates = config.train.updates + 1
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, updates=updates))
    train(longer, workdir, StopRequest())
    after = load_run(longer, workdir)[1]
    assert int(before.step) + 1 == int(after.step) == updates
    moved = [name for name in before.trainable if np.any(before.trainable[name] != after.trainable[name])]
    assert any("/recursion/" in name for name in moved)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[-2:]] == [updates - 1, updates] and np.isfinite(lines[-1]["loss"])
