"""Sampling and evaluation of a small run."""

import json
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.full_disk import full_disk
from tests.jobs.tiny import tiny_config
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.jobs.evaluate import evaluate
from trm_diffusion.jobs.sample import draw_all, make_sample_fn, sample, save_grid, write_images
from trm_diffusion.jobs.train import train
from trm_diffusion.run.protocol import evaluation_labels
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.signals import StopRequest


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("run") / "tiny")
    train(tiny_config(), path, StopRequest())
    return path


def draw(workdir, labels=(1, 2, 3, 4, 5, 6, 7, 8), **overrides) -> np.ndarray:
    config = tiny_config(**overrides)
    experiment, state = load_run(config, workdir)
    parameters = sampling_parameters(experiment, state)
    return np.concatenate(list(draw_all(make_sample_fn(experiment), config, parameters, np.asarray(labels, np.int32))))


def test_sample_writes_a_picture_and_the_images(workdir):
    sample(tiny_config(sample__classes=(3, 7), sample__per_class=2, sample__latent_steps=4), workdir, StopRequest())
    arrays = np.load(workdir / "samples" / "grid_0000008.npz")
    assert arrays["images"].shape == (4, 8, 8, 1) and arrays["labels"].tolist() == [3, 3, 7, 7]
    assert Image.open(workdir / "samples" / "grid_0000008.png").mode == "RGB"


def test_a_folder_of_named_images_holds_the_last_call_alone_and_its_record(tmp_path):
    folder = epath.Path(tmp_path) / "prompts_0000008"
    images = np.zeros((3, 2, 2, 3), np.float32)
    write_images(folder, images, ["a cat", "a dog", "?"], {"eta": 0.0})
    (folder / "mine.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images hold values that are not finite, the first is two birds"):
        write_images(folder, np.nan * images[:1], ["two birds"], {"eta": 0.5})
    assert not (tmp_path / "prompts_0000008.sampling.json").exists()  # the folder is not complete
    write_images(folder, images[:1], ["two birds"], {"eta": 0.5})
    assert sorted(path.name for path in folder.iterdir()) == ["0000_two-birds.png", "mine.png"]
    assert json.loads((tmp_path / "prompts_0000008.sampling.json").read_text()) == {"eta": 0.5}


def test_a_grid_during_training_reports_what_is_not_finite(workdir, tmp_path, capsys):
    experiment, state = load_run(tiny_config(), workdir)
    request = experiment.condition.request()

    def ruined(parameters, condition, indices):
        return np.where(np.arange(8)[:, None, None, None] == 3, np.nan, np.zeros((8, 8, 8, 1)))

    grid = save_grid(ruined, experiment, state, request, epath.Path(tmp_path) / "update_1.png")
    assert grid.dtype == np.uint8 and (tmp_path / "update_1.png").exists()
    assert "warning: update_1.png: 1 of 10 images hold values that are not finite" in capsys.readouterr().err


def test_an_image_depends_on_its_index_and_not_on_its_batch(workdir):
    eight = draw(workdir, sample__batch_size=8)
    np.testing.assert_allclose(draw(workdir, sample__batch_size=3), eight, atol=1e-5)
    assert np.abs(eight[0] - eight[1]).max() > 0.1
    assert np.abs(draw(workdir, sample__seed=1) - eight).max() > 0.1


def test_the_named_parameters_are_used(workdir):
    assert np.abs(draw(workdir, sample__parameters="raw") - draw(workdir)).max() > 1e-4
    np.testing.assert_array_equal(draw(workdir, sample__parameters="0.9"), draw(workdir))


def test_evaluate_writes_and_prints_one_report(workdir, capsys):
    evaluate(tiny_config(evaluate__kind="digits", evaluate__num_samples=30), workdir, StopRequest())
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((workdir / "evaluation.json").read_text())
    assert printed["judge_test_accuracy"] >= 0.97 and 0 <= printed["class_accuracy"] <= 1
    assert printed["pass"] is (printed["class_accuracy"] >= 0.9)
    wanted = {"samples", "label_rule", "sampler", "diffusion_steps", "guidance_scale", "guidance_interval",
              "guidance_channels", "latent_steps", "parameters", "train_seed", "sample_seed", "dtype", "vae",
              "version", "git_commit"}  # fmt: skip
    assert wanted <= printed["protocol"].keys()
    assert (workdir / "samples" / "evaluation.png").exists()


def test_figures_are_printed_before_a_full_disk_can_lose_them(workdir, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[evaluate.__module__], "check_writable", lambda path: None)  # it fills up later
    with full_disk(100), pytest.raises(UserError, match="cannot be written .File too large.: free some space"):
        evaluate(tiny_config(evaluate__kind="digits", evaluate__num_samples=30), workdir, StopRequest())
    assert json.loads(capsys.readouterr().out)["judge_test_accuracy"] >= 0.97


@pytest.mark.parametrize("job", [sample, evaluate])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, job, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys.modules[job.__module__], "load_run", None)  # would raise
    with pytest.raises(UserError, match="cannot be written .*a file is where a folder should be"):
        job(tiny_config(evaluate__kind="digits"), epath.Path(tmp_path / "file" / "run"), StopRequest())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_labels_are_never_sorted_by_class():
    balanced = evaluation_labels(tiny_config(), 20)
    assert np.bincount(balanced).tolist() == [2] * 10 and (np.diff(balanced) < 0).any()
    random = evaluation_labels(tiny_config(evaluate__label_rule="random"), 200)
    assert (np.diff(random) < 0).any() and set(random) == set(range(10))


def test_a_stop_request_ends_the_drawing(workdir):
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Interrupted, match="stopped after 0 of"):
        sample(tiny_config(), workdir, stop)


def test_no_run_in_the_workdir(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        sample(tiny_config(), epath.Path(tmp_path), StopRequest())
