"""The analysis job on small runs, trained with and without halting."""

import json

import numpy as np
import pytest
from etils import epath

from tests.jobs.tiny import tiny_config
from trm_diffusion.errors import UserError
from trm_diffusion.jobs.analyze import analyze
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest

RECURSIVE = dict(model__recursion__latent_steps=3, model__recursion__experts=3, train__updates=4)


def analyzed(workdir, capsys, **overrides) -> tuple[dict, list[dict]]:
    """The printed report, and its part by diffusion step."""
    analyze(tiny_config(**RECURSIVE, **overrides), workdir, StopRequest())
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((workdir / "analysis.json").read_text())
    steps = written.pop("by_diffusion_step")
    assert written == printed
    return printed, steps


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("run") / "plain")
    train(tiny_config(**RECURSIVE), path, StopRequest())
    return path


def test_routing_by_diffusion_step_latent_step_and_expert(workdir, capsys):
    report, steps = analyzed(workdir, capsys, sample__latent_steps=5, sample__diffusion_steps=4)
    assert report["blocks"] == [1] and report["latent_steps"] == 5 and report["halting"] == {"rule": "none"}
    assert [step["normalized_time"] for step in steps] == [1.0, 0.75, 0.5, 0.25]
    alive = report["liveness"]
    assert {"output_change_8", "loss_change_3", "gradient_ratio"} < set(alive)
    assert np.shape(alive["state_change"]) == (1, 2) and np.shape(alive["attention_entropy"]) == (1, 3)
    loads = np.array([step["expert_load"] for step in steps])
    assert loads.shape == (4, 1, 5, 1, 3)  # [S, R, T, P, M]
    np.testing.assert_allclose(loads.sum(-1), 1.0, atol=1e-4)
    np.testing.assert_allclose(report["expert_load"], loads.mean((0, 2)), atol=1e-4)
    assert all(step["mean_latent_steps"] == [5.0] for step in steps)


def test_halting_of_a_run_that_was_trained_without(workdir, capsys):
    convergence = dict(model__recursion__halting="convergence")
    report, steps = analyzed(workdir, capsys, **convergence, model__recursion__halting_epsilon=1e6)
    halting = report["halting"]  # every token stops after the first latent step of three; the last is always computed
    assert halting["mean_latent_steps"] == [2.0] and steps[0]["mean_latent_steps"] == [2.0]
    rows = halting["expert_rows_per_token"]
    assert (rows["asked"], rows["asked_without_halting"]) == (2, 3)
    assert (rows["computed"], rows["computed_without_halting"]) == (6, 9)
    assert halting["saved"].startswith("whole latent steps")
    assert halting["seconds_a_batch_with"] > 0 and halting["seconds_a_batch_without"] > 0

    report, _ = analyzed(workdir, capsys, **convergence, model__recursion__halting_epsilon=0.0)
    assert report["halting"]["saved"].startswith("nothing") and report["halting"]["mean_latent_steps"] == [3.0]
    assert report["halting"]["root_mean_square_change_of_images"] < 1e-5


@pytest.mark.parametrize("rule", ["convergence", "learned"])
def test_halting_from_training_to_samples(rule, tmp_path, capsys):
    config = dict(model__recursion__halting=rule, model__recursion__halting_epsilon=0.3, train__latent_steps=(1, 3))
    workdir = epath.Path(tmp_path / "run")
    train(tiny_config(**RECURSIVE, **config), workdir, StopRequest())
    sample(tiny_config(**RECURSIVE, **config), workdir, StopRequest())
    images = np.load(workdir / "samples" / "grid_0000004.npz")["images"]
    assert np.isfinite(images).all() and images.std() > 0.1
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    report, _ = analyzed(workdir, capsys, **config)
    assert report["halting"]["rule"] == rule and 1 <= report["halting"]["mean_latent_steps"][0] <= 3


def test_a_run_without_recursion_has_nothing_to_analyze(tmp_path):
    with pytest.raises(UserError, match="blocks is none: no block recurses"):
        analyze(tiny_config(model__recursion__blocks="none"), epath.Path(tmp_path), StopRequest())
