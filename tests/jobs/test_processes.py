"""Two processes give the same results as one process with as many devices, also after kills and stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image
from sklearn.datasets import load_digits

from tests.jobs.tiny import ROOT, all_finished, command, finished, tiny_config, write_tiny_vae
from tests.jobs.together import EXPORTED, MESHES, RECORDS
from trm_diffusion.config import to_dict
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest

UPDATES = 80


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Directories of all jobs, run by one process with two devices and by two processes with one each."""
    inputs = tmp_path_factory.mktemp("processes")
    write_tiny_vae(inputs / "vae")
    digits = load_digits()
    for index in range(20):
        path = inputs / "images" / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize((16, 16)).save(path)
    for count in (1, 2):
        (inputs / str(count)).mkdir()
        port, environment = free_port(), dict(os.environ)
        environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={2 // count}"
        options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        arguments = [sys.executable, "-m", "tests.jobs.together", inputs / str(count), inputs]
        each = [[*map(str, (*arguments, index, count, port))] for index in range(count)]
        all_finished([subprocess.Popen(one, **options) for one in each])
    return inputs / "1", inputs / "2"


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(one, two) -> None:
    one, two = lines_of(one), lines_of(two)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for field in ("loss", "gradient_norm", "expert_load", "drop_fraction", "gate_entropy"):
        np.testing.assert_allclose(*([line[field] for line in lines] for lines in (two, one)), rtol=1e-5)


@pytest.mark.parametrize("mesh", ["data", *MESHES])
def test_training_is_the_same(jobs, mesh):
    assert_same_metrics(*(directory / mesh for directory in jobs))


@pytest.mark.parametrize("mesh", ["data", *MESHES])
def test_exports_are_the_same_bytes(jobs, mesh):
    one, two = ({file.name: file.read_bytes() for file in (jobs_ / f"{mesh}_images").iterdir()} for jobs_ in jobs)
    assert len(one) == EXPORTED + 2 and one == two
    one, two = (json.loads((jobs_ / f"{mesh}_images.sampling.json").read_text()) for jobs_ in jobs)
    assert one == two
    one, two = ((jobs_ / f"{mesh}_images.npz").read_bytes() for jobs_ in jobs)
    assert one == two


def test_latents_samples_evaluation_and_features_are_the_same(jobs):
    one, two = ({file.name: file.read_bytes() for file in (jobs_ / "latents").iterdir()} for jobs_ in jobs)
    assert len(one) == 9 and one == two  # four shards, a record of each, and the manifest
    one, two = (np.load(jobs_ / "data" / "samples" / "grid_0000003.npz")["images"] for jobs_ in jobs)
    np.testing.assert_allclose(one, two, atol=1e-5)
    one, two = (json.loads((jobs_ / "data" / "evaluation.json").read_text()) for jobs_ in jobs)
    assert one["num_images"] == 20 and one.pop("frechet_pixels64") == pytest.approx(two.pop("frechet_pixels64"))
    assert one["protocol"] == two["protocol"] and one["class_accuracy_per_class"] == two["class_accuracy_per_class"]
    one, two = (np.load(jobs_ / "features.npy") for jobs_ in jobs)
    assert one.shape == (EXPORTED, 3)
    np.testing.assert_array_equal(one, two)


def test_processes_partition_every_epoch(jobs):
    whole = np.load(jobs[0] / "read_0.npy")
    shares = np.concatenate([np.load(jobs[1] / f"read_{index}.npy") for index in (0, 1)], axis=1)
    assert shares.shape == whole.shape == (2, RECORDS)
    np.testing.assert_array_equal(np.sort(shares, axis=1), np.tile(np.arange(RECORDS), (2, 1)))


@pytest.fixture
def pair(tmp_path):
    """Starts both processes of a run through the command line."""
    config = tiny_config(train__updates=UPDATES, log__every=10, checkpoint__every=10, checkpoint__keep=1)
    settings = to_dict(config)
    (tmp_path / "tiny.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )

    def start(*flags: str):
        common = (f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'two'}", *flags)
        common += (f"--coordinator=localhost:{free_port()}", "--process_count=2")
        return [command(*common, f"--process_index={index}") for index in (0, 1)]

    return start, config


def test_killed_stopped_and_gone_on_it_equals_one_process(pair, tmp_path):
    start, config = pair
    train(config, epath.Path(tmp_path / "one"), StopRequest())

    both, checkpoints = start(), tmp_path / "two" / "checkpoints"
    while not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    for process in both:
        process.send_signal(signal.SIGKILL)
    for process in both:
        process.communicate(timeout=300)
    assert lines_of(tmp_path / "two")[-1]["step"] < UPDATES

    both = start()
    while "memory" not in (line := both[1].stderr.readline()):
        assert line, "the job ended before it trained"
    both[1].send_signal(signal.SIGTERM)  # only process 1 is asked
    ends = [err.splitlines()[-1] for _, err in all_finished(both, code=75)]
    assert ends[0] == ends[1] and ends[0].startswith("stopped at update ") and f"of {UPDATES}" in ends[0]

    all_finished(start())
    assert_same_metrics(tmp_path / "one", tmp_path / "two")
    assert len(lines_of(tmp_path / "two")) == UPDATES // 10
    one, two = (tmp_path / run for run in ("one", "two"))
    more = tiny_config(train__updates=UPDATES + 10, log__every=10, checkpoint__every=10)
    for run in (one, two):  # one process resumes what two have saved
        train(more, epath.Path(run), StopRequest())
    assert lines_of(two)[-1]["step"] == UPDATES + 10
    assert_same_metrics(one, two)


def test_a_mistake_that_all_make_ends_all_with_its_line(pair):
    start, _ = pair
    for _, err in all_finished(start("--mode=evaluate", "--config.evaluate.kind=digits"), code=2):
        assert err.splitlines()[-1].startswith("error: ") and "holds no run" in err


@pytest.mark.parametrize(("index", "absent"), [(0, 1), (1, 0)])
def test_one_of_two_alone_ends_in_one_line_that_names_the_other(pair, index, absent):
    arguments = (f"--process_index={index}", "--process_count=2", "--start_timeout=2")
    address = f"localhost:{free_port()}"
    process = command("--config=configs/digits.py", f"--coordinator={address}", *arguments)
    out, err = finished(process, code=75)
    (line,) = err.strip().splitlines()
    assert line.startswith(f"process {absent} of 2 did not connect to {address} within 2 s") and not out
