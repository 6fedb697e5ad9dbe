"""The ImageNet experiment at a tiny size: equal on 1 and 8 devices, resumed and sampled; refused where it must be."""

import json

import numpy as np
import pytest

from tests.jobs.tiny import command, finished

TINY = (
    "--config=configs/imagenet256.py:model=S/2,recursion=middle",
    "--config.data.source=synthetic",
    "--config.data.image_size=8",
    "--config.data.num_classes=10",
    "--config.model.depth=2",
    "--config.model.width=64",
    "--config.model.heads=4",
    "--config.model.dtype=float32",
    "--config.model.recursion.rank=4",
    "--config.model.recursion.routing_group=1",
    "--config.model.recursion.switch_loss_weight=0.1",
    "--config.model.recursion.balance_bias_rate=0.01",
    "--config.train.batch_size=16",
    "--config.optim.lr=1e-3",
    "--config.sample.diffusion_steps=3",
    "--config.sample.classes=1,2",
    "--config.sample.per_class=2",
    "--config.sample.batch_size=8",
    "--config.log.every=1",
    "--config.log.tensorboard=false",
)
MESHES = {  # name: devices, flags
    "one": (1, ()),
    "data": (8, ("--config.mesh.fsdp=1",)),
    "data_fsdp_tensor": (8, ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
}


def run(workdir, name: str, *flags: str):
    devices, mesh = MESHES[name]
    return finished(command(*TINY, *mesh, *flags, f"--workdir={workdir / name}", devices=devices))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three updates, a checkpoint, a fourth update after a resume, and samples, on each mesh."""
    workdir = tmp_path_factory.mktemp("devices")
    for name in MESHES:
        run(workdir, name, "--config.train.updates=3")
        run(workdir, name, "--config.train.updates=4")
    return workdir


def logged(run, field: str) -> list:
    return [json.loads(line)[field] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["data", "data_fsdp_tensor"])
def test_eight_devices_equal_one(runs, name):
    expected = logged(runs / "one", "loss")
    assert len(expected) == 4 and len(set(expected)) == 4
    np.testing.assert_allclose(logged(runs / name, "loss"), expected, rtol=1e-5)
    for statistic in ("expert_load", "drop_fraction", "gate_entropy"):  # global, not a device's own
        np.testing.assert_allclose(logged(runs / name, statistic), logged(runs / "one", statistic), rtol=1e-5)
    assert min(logged(runs / "one", "drop_fraction")) > 0
    one, other = (np.load(runs / which / "samples" / "grid_0000004.npz")["images"] for which in ("one", name))
    assert one.shape == (4, 8, 8, 4)
    np.testing.assert_allclose(other, one, atol=1e-3)


def test_a_checkpoint_of_eight_devices_goes_on_on_one(runs):
    arguments = (*TINY, "--config.train.updates=5", f"--workdir={runs / 'data'}")
    _, err = finished(command(*arguments, devices=1))
    assert "at update 4" in err and len(logged(runs / "data", "loss")) == 5


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


TINY_SD3 = (
    "--config=configs/sd3_medium.py:recursion=0",
    "--config.data.image_size=8",
    "--config.model.depth=2",
    "--config.model.width=32",
    "--config.model.heads=2",
    "--config.model.dtype=float32",
    "--config.model.text.length=5",
    "--config.model.text.features=12",
    "--config.model.text.pooled_features=6",
    "--config.model.recursion.rank=4",
    "--config.train.updates=3",
    "--config.train.trainable=all",
    "--config.train.batch_size=8",
    "--config.optim.lr=1e-2",
    "--config.sample.diffusion_steps=2",
    "--config.sample.batch_size=8",
    "--config.log.every=1",
    "--config.log.tensorboard=false",
)


def test_text_to_image_on_eight_devices_equals_one(tmp_path):
    """SD3-medium's config; all of it trained, for a fresh base answers zero whatever the recursion does."""
    lines = []
    for name in ("one", "data_fsdp_tensor"):
        devices, mesh = MESHES[name]
        workdir = tmp_path / name
        finished(command(*TINY_SD3, *mesh, f"--workdir={workdir}", devices=devices))
        lines.append([json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()])
        assert (workdir / "samples" / "grid_0000003.png").exists()
    one, eight = (np.array([line["loss"] for line in run]) for run in lines)
    assert len(set(one)) == 3
    np.testing.assert_allclose(eight, one, rtol=1e-5)
