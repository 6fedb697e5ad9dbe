"""What training and the analysis report of the recursion's liveness, and when they warn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.jobs.test_train import lively
from tests.jobs.tiny import tiny_config
from trm_diffusion.experiment import build
from trm_diffusion.jobs.liveness import make_liveness, warn_if_dead
from trm_diffusion.jobs.train import train
from trm_diffusion.runtime.signals import StopRequest

DIGITS = dict(data__source="digits")
ALIVE = dict(model__recursion__base_every_step=True, model__recursion__base_input="carry")


def measured(parameters=lively, **overrides):
    """The experiment, its parameters, and what is measured of them."""
    experiment = build(tiny_config(**DIGITS | overrides))
    values = parameters(experiment)
    return experiment, values, make_liveness(experiment, epath.Path("unused"))(values)


def test_the_numbers_are_those_of_the_network_on_held_out_digits():
    experiment, parameters, line = measured()
    test = dataclasses.replace(experiment.config.data, split="test")
    source = build(dataclasses.replace(experiment.config, data=test)).condition.source()
    records = [source[int(index)] for index in np.linspace(0, len(source) - 1, 8)]
    images, labels = (jnp.stack([record[name] for record in records]) for name in ("image", "label"))
    time_key, noise_key = jax.random.split(jax.random.key(0))
    objective = experiment.objective
    times, noise = objective.sample_times(time_key, 8), jax.random.normal(noise_key, images.shape)
    noisy = objective.perturb(images, noise, times)

    @jax.jit
    def at_depths(parameters):
        network = experiment.network(parameters)
        call = (noisy, objective.network_times(times), labels)
        outputs = [network(*call, latent_steps=steps)[0] for steps in (1, 2, 8)]
        return outputs, [jnp.mean(objective.loss(output, images, noise, noisy, times)) for output in outputs]

    (one, two, eight), losses = at_depths(parameters)
    for steps, output, loss in ((2, two, losses[1]), (8, eight, losses[2])):
        change = np.linalg.norm(output - one) / np.linalg.norm(one)
        np.testing.assert_allclose(line[f"output_change_{steps}"], change, rtol=1e-3)
        np.testing.assert_allclose(line[f"loss_change_{steps}"], loss - losses[0], atol=1e-4 * losses[0])
    assert line["output_change_2"] > 1e-4
    assert np.shape(line["state_change"]) == np.shape(line["state_drift"]) == (1, 1)  # one block, T - 1 latent steps
    assert np.shape(line["attention_entropy"]) == np.shape(line["update_ratio"]) == (1, 2)
    assert line["gradient_ratio"] > 0


def test_a_loop_has_output_and_loss_alone():
    _, _, line = measured(model__recursion__looped=True, model__recursion__latent_steps=3)
    assert set(line) == {f"{name}_change_{steps}" for name in ("output", "loss") for steps in (2, 3, 4, 8)}
    assert line["output_change_3"] > 0.01


@pytest.mark.parametrize("change, update, warns", [(0.0049, 3, True), (0.0051, 3, False), (0.0049, 2, False)])
def test_the_warning_comes_below_half_a_percent_after_the_warm_up(change, update, warns, capsys):
    experiment = build(tiny_config(**DIGITS))  # its warm-up has 2 updates
    warn_if_dead(experiment, {"output_change_2": change}, update)
    said = capsys.readouterr().err
    assert said.count("\n") == warns
    assert ("T = 2 latent steps change the network's output by 0.49%" in said and "docs/mechanism.md" in said) == warns


@pytest.mark.parametrize("form, fields", [("paper", {}), ("alive", ALIVE)])
def test_a_run_logs_it_and_its_end_says_whether_it_is_dead(form, fields, tmp_path, capsys):
    """Logged in the first line at or after each multiple, and in the last; also where the run is resumed."""
    few = dict(train__updates=5, log__liveness_every=3, checkpoint__every=5)
    train(tiny_config(**DIGITS, **fields, **few), epath.Path(tmp_path), StopRequest())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "output_change_2" in line] == [4, 5]
    assert [line["step"] for line in lines] == [2, 4, 5]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("update 5: T = 2 latent steps change") == (lines[-1]["output_change_2"] < 0.005)
    assert (lines[-1]["output_change_2"] < 0.005) == (form == "paper")
