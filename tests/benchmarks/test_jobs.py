"""The benchmarks of sampling, checkpoints, startup and data run at the smallest size and check their targets."""

import json
import subprocess
import sys

from benchmarks import checkpoint, loader, sampling


def test_sampling():
    rows = {"heun_guided": ("rectified_flow", "heun", 2.0)}
    found = sampling.measure(sampling.Sizes(depth=1, images=1, diffusion_steps=2, repeats=1), rows)
    row = found["rows"]["heun_guided"]
    assert row["network_evaluations"] == 3 and row["images_per_second"] > 0
    assert found["pass"] is (row["evaluation_over_forward_pass"] <= 1.1)


def test_checkpoint(tmp_path):
    found = checkpoint.measure(tmp_path, checkpoint.Sizes("S/8", depth=1, images=1, steps=1, saves=1, restores=1))
    assert 0.04 < found["state_gigabytes"] < 0.08
    assert found["pass"] is (found["blocked_over_step"] <= 0.1 and found["checksums_over_restore"] <= 0.1)
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["2"]


def test_loader():
    assert 0 <= loader.demo_data_wait_share(updates=4, every=2) < 1


def test_startup():
    command = [sys.executable, "-m", "benchmarks.startup", "--turns=1", "--depth=1"]
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    assert found["pass"] is all(found["met"].values())
    for seconds in (found["seconds_with_an_empty_cache"], found["seconds_with_the_cache"]):
        assert seconds["total"] > seconds["first_update"] > seconds["second_update"] > 0
