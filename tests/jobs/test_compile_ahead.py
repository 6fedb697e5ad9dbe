"""The cost of a step on every device, compiled ahead of time; on eight simulated devices if libtpu is missing."""

import json
import os
import subprocess
import sys

import pytest

from tests.jobs.tiny import ROOT, command, finished, tiny_config
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.compile_ahead import advice, gib_in, more_parts
from trm_diffusion.runtime.libtpu import DIRECTORY, find_libtpu
from trm_diffusion.runtime.parameters import memory
from trm_diffusion.runtime.topology import parse_topology


@pytest.fixture(scope="module")
def eight():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags}
    child = subprocess.run(
        [sys.executable, "-m", "tests.jobs.eight_devices"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_collectives_in_a_loop_by_kind_and_bytes(eight):
    size = 4 * 64 * 8 / 4  # bytes on a device; groups have 4 devices, and 2 for the sum
    sent = {"collective-permute": 1, "all-gather": 3, "reduce-scatter": 4 * 3 / 4, "all-to-all": 3 / 4, "all-reduce": 1}
    assert eight["kinds"] == {kind: {"count": 3, "bytes": 3 * share * size} for kind, share in sent.items()}


def test_a_training_step_over_eight_devices(eight):
    report = eight["report"]
    assert report["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "expert": 1}
    assert report["fits"] and not report["advice"] and not report["loops_counted_once"]
    # Every device does an eighth of the work of one: images are sharded, and no work is duplicated.
    assert report["flops_per_device"] == pytest.approx(report["model_flops_per_device"], rel=0.05)
    # Parameters (float32 here) are gathered at most once each for the forward and the backward pass.
    parameters = memory(
        build(tiny_config(model__depth=3, model__width=64, model__recursion__blocks="none")).model.shapes
    )
    gathered = report["collectives_per_device"]["all-gather"]["bytes"]
    assert 0.5 * parameters < gathered < 2.1 * parameters * 7 / 8
    memory_gib = report["memory_gib_per_device"]
    kinds = {"arguments", "outputs", "aliased", "temporaries", "code", "peak", "total", "capacity"}
    assert memory_gib.keys() == kinds | {
        f"state_{part}" for part in ("parameters", "gradients", "optimiser", "averages")
    }
    assert all(size >= 0 for size in memory_gib.values())
    assert report["largest_of_state"][0]["name"].split("/")[0] in ("trainable", "optimizer", "ema")


@pytest.mark.parametrize(("name", "slices", "what"), [
    ("", 1, "needs --topology: one of v4:2x2x4, v5e:4x4"),
    ("v5:4x4x4", 1, "no such TPU"),
    ("v5p", 1, "no such TPU"),
    ("v5p:4x4", 1, "v5p has 3 axes, as in v5p:4x4x4"),
    ("v6e:8x8x8", 1, "v6e has 2 axes"),
    ("v5p:3x4x4", 1, "1 or even"),
    ("v6e:32x32", 1, "at most 256 chips"),
    ("v5p:4x4x4", 0, "--slices=0"),
])  # fmt: skip
def test_a_topology_that_is_none_is_one_line(name, slices, what):
    with pytest.raises(UserError, match=what) as error:
        parse_topology(name, slices)
    assert "\n" not in str(error.value)


def test_chips_of_a_topology():
    pod = parse_topology("tpu7x:2x2x4", 2)
    assert (pod.chips, pod.chip.devices) == (32, 2)


def test_no_network_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv(DIRECTORY, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=f"could not be installed .*set {DIRECTORY}") as error:
        find_libtpu(install=True)
    assert "\n" not in str(error.value) and not list((tmp_path / "trm_diffusion").iterdir())
    with pytest.raises(UserError, match="--mode=compile installs it"):
        find_libtpu(install=False)


def test_advice_begins_with_what_is_too_large():
    config = dict(train__batch_size=64, model__attention="xla", model__recursion__blocks="none", train__accumulate=2)
    experiment, chip = build(tiny_config(**config)), parse_topology("v5e:2x2")
    flags = [entry["flag"] for entry in advice(experiment, chip, "train", state=1.0, temporaries=55.8)]
    assert flags[:2] == ["--config.model.attention=auto", "--config.model.remat=full"]
    assert flags[2] == "--config.train.accumulate=16"  # the fewest parts that fit
    assert advice(experiment, chip, "train", state=20.0, temporaries=1.0)[0]["flag"] == "--topology"
    assert more_parts(experiment.config, per_device=2, times=4.0) is None
    assert gib_in("required for HLO temporaries (55.78G) exceeds available HBM (15.75G)") == 55.78


@pytest.mark.skipif(DIRECTORY not in os.environ, reason="needs libtpu, in the directory that TRM_LIBTPU names")
def test_two_slices_of_a_real_topology():
    arguments = (
        "--mode=compile",
        "--topology=v5p:2x2x1",
        "--slices=2",
        "--config=configs/imagenet256.py:model=S/8,recursion=off",
        "--config.model.depth=2",
        "--config.model.remat=none",
        "--config.train.batch_size=16",
    )
    out, _ = finished(command(*arguments))
    report = json.loads(out.splitlines()[-1])
    assert report["fits"] and report["mesh"]["data"] == 2 and report["mesh"]["fsdp"] == 4
    assert report["collectives_per_device"]["all-reduce between slices"]["bytes"] > 0
    assert report["flops_per_device"] == pytest.approx(report["model_flops_per_device"], rel=0.05)
    assert 0 < report["seconds"]["arithmetic"] < 1 and 0 < report["mfu"] < 1
