"""A model gives the same results on one device and on every mesh of eight; missing data and platforms are refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.jobs.meshes import EXPERTS, HEIRS, MESHES, MODELS, MORE, RANK, UPDATES, WIDTH
from tests.jobs.tiny import ROOT, command, finished
from trm_diffusion.models.recursion.dispatch import IMPLEMENTATIONS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output of tests/jobs/meshes.py, which needs its own process with eight devices."""
    directory, environment = tmp_path_factory.mktemp("meshes"), dict(os.environ)
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    arguments = [sys.executable, "-m", "tests.jobs.meshes", str(directory)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finished(subprocess.Popen(arguments, cwd=ROOT, env=environment, **options))
    return directory


def found(runs, name: str) -> dict:
    with np.load(runs / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_same(one: dict, other: dict) -> None:
    """Equal within 1e-5 of the largest entry, the rounding error of sums over many terms."""
    assert one.keys() == other.keys()
    for name in one:
        expected, actual = one[name].astype(np.float64), other[name].astype(np.float64)
        np.testing.assert_allclose(
            actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(initial=0.0), err_msg=name
        )


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
@pytest.mark.parametrize("model", MODELS)
def test_every_mesh_equals_one_device(runs, model, mesh):
    """Compares losses, routing and other metrics of five updates, the last gradient, and samples."""
    one = found(runs, f"{model}_one")
    assert_same(one, found(runs, f"{model}_{mesh}"))
    assert len(set(one["metric/loss"].tolist())) == UPDATES and one["metric/drop_fraction"].min() > 0
    assert np.ptp(one["metric/expert_load"]) > 0 and np.ptp(one["samples"]) > 0
    moved = [name for name, value in one.items() if name.startswith("gradient/") and np.abs(value).max() > 0]
    assert any("/experts/down" in name for name in moved) and any("/gate/" in name for name in moved)


@pytest.mark.parametrize("heir", [name for name in HEIRS if name != "one"])
def test_a_checkpoint_of_eight_devices_goes_on_on_fewer(runs, heir):
    one = found(runs, "dit_one_goes_on")
    assert_same(one, found(runs, f"dit_{heir}_goes_on"))
    assert len(set(one["metric/loss"].tolist())) == MORE


@pytest.mark.parametrize("dispatch", IMPLEMENTATIONS)
def test_routing_groups_are_local_and_experts_come_to_the_tokens(runs, dispatch):
    """Replicated experts need no collective; sharded experts need only all-gathers of their weights."""
    collectives = json.loads((runs / "dispatch.json").read_text())
    everywhere, owned = (collectives[f"{dispatch}_{where}"] for where in ("everywhere", "owned"))
    assert everywhere == []
    assert {kind for _, kind in owned} == {"all-gather"}
    for shape, _ in owned:
        sizes = [int(size) for size in shape.partition("[")[2].partition("]")[0].split(",")]
        assert EXPERTS in sizes and np.prod(sizes) <= 3 * EXPERTS * RANK * WIDTH  # a whole weight


def test_no_prepared_data_ends_in_one_line_that_says_how(tmp_path):
    _, err = finished(command("--config=configs/imagenet256.py:model=S/8", f"--workdir={tmp_path / 'run'}"), code=2)
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "--mode=prepare" in line and "synthetic" in line


def test_a_platform_that_is_not_here_is_refused():
    process = command("--mode=doctor", "--platform=cuda")
    _, err = finished(process, code=2)
    assert err.startswith("error: --platform=cuda") and len(err.strip().splitlines()) == 1


def test_doctor_prints_one_json_line_last():
    out, _ = finished(command("--mode=doctor", "--platform=cpu"))
    report = json.loads(out.splitlines()[-1])
    assert report["pass"] is True and report["missing"] == [] and report["devices"]
