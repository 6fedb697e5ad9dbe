"""The training update as a pure function: its loss, EMA, skipped updates and compilation."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from etils import epath

from tests.jobs.tiny import tiny_config
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.train import train
from trm_diffusion.jobs.train_step import draw_latent_steps, loss_and_metrics, make_train_step
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.restore import layers_of_run, load_run
from trm_diffusion.runtime import doubt
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.logging import WALL_CLOCK_FIELDS
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.signals import StopRequest


def batch(size=8, seed=0):
    """Uniform images whose brightness encodes their label, with a little noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, size)
    images = (labels / 5.0 - 0.9)[:, None, None, None] + 0.1 * rng.standard_normal((size, 8, 8, 1))
    return {"image": jnp.asarray(images, jnp.float32), "label": jnp.asarray(labels, jnp.int32)}


def test_one_compilation_in_a_hundred_updates():
    experiment = build(tiny_config(train__updates=100, train__latent_steps=(1, 2)))
    state, step = experiment.init_state(), make_train_step(experiment)
    losses = []
    for index in range(100):
        state, metrics = step(state, batch(seed=index % 4))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert int(state.step) == 100
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_state_and_metrics_have_the_declared_shapes_and_dtypes():
    experiment = build(tiny_config())
    state, step = experiment.init_state(), make_train_step(experiment)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, experiment.abstract_state)
    state, metrics = step(state, batch())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, experiment.abstract_state)
    chex.assert_shape([metrics["loss"], metrics["gradient_norm"], metrics["drop_fraction"]], ())
    chex.assert_shape([metrics["quarter_loss_sum"], metrics["quarter_images"]], (4,))
    chex.assert_shape(metrics["expert_load"], (2,))
    chex.assert_type(metrics["loss"], jnp.float32)
    np.testing.assert_allclose(metrics["quarter_images"].sum(), 8)
    np.testing.assert_allclose(metrics["quarter_loss_sum"].sum() / 8, metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["expert_load"].sum(), 1, rtol=1e-6)


class LossTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("rectified_flow", "ddpm")
    def test_loss_is_the_mean_over_images(self, objective):
        experiment = build(tiny_config(diffusion__objective=objective, sample__sampler="ddim"))
        state = experiment.init_state()
        data, key = batch(), jax.random.key(3)
        loss, (metrics, _) = self.variant(lambda p, image, label: loss_and_metrics(experiment, p, image, label, key))(
            state.parameters, data["image"], data["label"]
        )
        chex.assert_shape(loss, ())
        chex.assert_tree_all_finite(metrics)
        # An untrained network outputs zero, so the loss is the mean square of its target.
        time_key, noise_key, *_ = jax.random.split(key, 5)
        noise = jax.random.normal(noise_key, data["image"].shape)
        target = noise if objective == "ddpm" else noise - data["image"]
        np.testing.assert_allclose(loss, jnp.mean(jnp.square(target)), rtol=1e-5)


def test_accumulated_parts_give_the_mean_gradient():
    """Four accumulated parts, each with its own key, give the mean of four separate gradients."""
    config = tiny_config(train__accumulate=4, optim__clip_norm=0.0, model__recursion__routing_group=1)
    experiment = build(config)
    state, data = experiment.init_state(), batch()
    key = key_for(config.seed, Purpose.TRAINING, 0)
    grad = jax.jit(jax.grad(lambda p, image, label, key: loss_and_metrics(experiment, p, image, label, key)[0]))
    parts = [
        grad(state.parameters, data["image"][i::4], data["label"][i::4], jax.random.fold_in(key, i)) for i in range(4)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *parts)
    expected = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in mean.values()))
    _, metrics = make_train_step(experiment)(state, data)
    np.testing.assert_allclose(metrics["gradient_norm"], expected, rtol=1e-5)


def test_all_accumulated_parts_have_one_depth():
    """A drawn T is that of the update: its gradient is the mean over parts of that depth, and of no other."""
    fields = dict(model__recursion__latent_steps=2, model__recursion__routing_group=1, train__latent_steps=(1, 2))
    config = tiny_config(train__accumulate=4, optim__clip_norm=0.0, **fields)
    experiment = build(config)
    state, data = dataclasses.replace(experiment.init_state(), trainable=lively(experiment)), batch()
    step, loss = make_train_step(experiment), jax.jit(functools.partial(loss_and_metrics, experiment))
    depths = []
    for update in range(6):
        key = key_for(config.seed, Purpose.TRAINING, update)
        parts = [(data["image"][i::4], data["label"][i::4], jax.random.fold_in(key, i)) for i in range(4)]
        at_depth = [np.mean([loss(state.trainable, *part, steps)[1][0]["loss"] for part in parts]) for steps in (1, 2)]
        now = dataclasses.replace(jax.tree.map(jnp.array, state), step=jnp.asarray(update, state.step.dtype))
        found = step(now, data)[1]["loss"]
        assert abs(at_depth[0] / at_depth[1] - 1) > 1e-3
        depths.append(np.argmin(np.abs(np.array(at_depth) - found)))
        np.testing.assert_allclose(found, at_depth[depths[-1]], rtol=1e-5)
    assert set(depths) == {0, 1}


def test_non_finite_update_changes_nothing_but_the_update_number():
    experiment = build(tiny_config())
    step = make_train_step(experiment)
    state, _ = step(experiment.init_state(), batch())
    before = jax.tree.map(np.asarray, state)
    bad = batch()
    bad["image"] = bad["image"].at[0, 0, 0, 0].set(jnp.nan)
    state, metrics = step(state, bad)
    assert metrics["skipped"] == 1 and int(state.step) == int(before.step) + 1
    chex.assert_trees_all_equal(dataclasses.replace(state, step=before.step), before)
    assert np.any(metrics["nonfinite_gradients"])


def test_a_gradient_too_large_to_be_squared_is_named_as_what_went_wrong():
    experiment = build(tiny_config())
    state = experiment.init_state()
    trainable = dict(state.trainable)
    trainable["final/modulation/bias"] += 1e25  # the final layer accepts that much, because it starts at zero
    before = jax.tree.map(np.asarray, dataclasses.replace(state, trainable=trainable))
    state, metrics = make_train_step(experiment)(jax.tree.map(jnp.asarray, before), batch())
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    names, flags = sorted(before.trainable), np.asarray(metrics["nonfinite_gradients"])
    assert [name for name, bad in zip(names, flags, strict=True) if bad] == ["final/out/kernel"]
    chex.assert_trees_all_equal(dataclasses.replace(state, step=before.step), before)


def test_averages_follow_the_parameters_of_the_same_update():
    experiment = build(tiny_config(optim__ema_decays=(0.75,), optim__ema_warmup=False))
    before = jax.tree.map(np.asarray, experiment.init_state())
    state, _ = make_train_step(experiment)(experiment.init_state(), batch())
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before.trainable, state.trainable)
    chex.assert_trees_all_close(state.ema["0.75"], expected, rtol=1e-6, atol=1e-9)
    assert any(np.any(new != before.trainable[name]) for name, new in state.trainable.items())


def test_frozen_parameters_have_no_optimizer_state_and_do_not_move():
    experiment = build(tiny_config(train__trainable="recursion"))
    state = experiment.init_state()
    assert state.trainable and all("/recursion/" in name for name in state.trainable)
    frozen = jax.tree.map(np.asarray, state.frozen)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
    assert shapes <= {leaf.shape for leaf in state.trainable.values()}
    step = make_train_step(experiment)
    for seed in range(3):
        state, _ = step(state, batch(seed=seed))
    chex.assert_trees_all_equal(state.frozen, frozen)


def test_draw_latent_steps():
    assert draw_latent_steps((), None) is None and draw_latent_steps((3,), None) == 3
    drawn = {int(draw_latent_steps((2, 4), jax.random.key(i))) for i in range(50)}
    assert drawn == {2, 3, 4}


def lively(experiment):
    """Parameters without zeros, so that the number of latent steps matters."""
    leaves = experiment.init_state().parameters.items()
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32) for name, leaf in leaves}


def test_the_per_latent_step_loss_is_the_mean_loss_of_fewer_latent_steps():
    """Also if T is drawn: the terms are those below this update's T, and T = 1 has none."""
    data, key = batch(), jax.random.key(3)

    def total_and_loss(**overrides):
        experiment = build(tiny_config(model__recursion__latent_steps=3, **overrides))
        steps = draw_latent_steps(experiment.config.train.latent_steps, key)
        loss = jax.jit(lambda p, image, label: loss_and_metrics(experiment, p, image, label, key, steps))
        total, (metrics, _) = loss(lively(experiment), data["image"], data["label"])
        return float(total), float(metrics["loss"])

    losses = [total_and_loss(train__latent_steps=(steps,))[1] for steps in (1, 2, 3)]
    assert len(set(losses)) == 3
    weighted = dict(train__latent_step_loss_weight=0.5)
    expected = [losses[0], losses[1] + 0.5 * losses[0], losses[2] + 0.5 * (losses[0] + losses[1]) / 2]
    np.testing.assert_allclose(total_and_loss(**weighted), (expected[2], losses[2]), rtol=1e-5)
    later = losses[2] + 0.5 * (losses[0] + 4 * losses[1]) / 5
    np.testing.assert_allclose(total_and_loss(**weighted, train__latent_step_loss_power=2.0)[0], later, rtol=1e-5)
    drawn = total_and_loss(**weighted, train__latent_steps=(1, 3))
    depth = losses.index(min(losses, key=lambda loss: abs(loss - drawn[1])))
    np.testing.assert_allclose(drawn, (expected[depth], losses[depth]), rtol=1e-5)


def test_metrics_file_and_checkpoint(tmp_path):
    train(tiny_config(), epath.Path(tmp_path / "run"), StopRequest())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    fields = {"loss", "loss_quarter_1", "gradient_norm", "learning_rate", "images_per_second", "data_wait_share",
              "expert_load", "drop_fraction", "gate_entropy"}  # fmt: skip
    assert fields <= lines[0].keys()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["4", "8"]


def test_gives_up_after_updates_in_a_row_that_are_not_finite(tmp_path):
    config = tiny_config(optim__lr=1e30, optim__clip_norm=0.0, optim__warmup_steps=0, train__nonfinite_limit=2)
    with pytest.raises(UserError, match="updates in a row .* lower config.optim.lr"):
        train(config, epath.Path(tmp_path / "run"), StopRequest())


def test_a_stop_request_saves_and_the_next_run_equals_one_without_it(tmp_path):
    whole, parts = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "parts")
    train(tiny_config(), whole, StopRequest())
    stop = StopRequest()
    stop.requested = True
    for _ in range(3):  # each run does one update, saves and exits
        with pytest.raises(Interrupted):
            train(tiny_config(), parts, stop)
    train(tiny_config(), parts, StopRequest())
    assert_same_run(whole, parts)


def assert_same_run(one: epath.Path, other: epath.Path) -> None:
    """Equal final states, to the bit, and equal metrics except wall-clock fields."""
    abstract = build(tiny_config()).abstract_state
    states, lines = [], []
    for run in (one, other):
        with Checkpoints(run / "checkpoints") as checkpoints:
            states.append(checkpoints.restore(checkpoints.latest_step(), abstract)[0])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if k not in WALL_CLOCK_FIELDS} for line in records])
    chex.assert_trees_all_equal(*states)
    assert lines[0] == lines[1]


def test_another_runs_parameters_start_a_run_and_missing_ones_must_be_named(tmp_path):
    base = tiny_config(model__recursion__blocks="none", train__updates=3)
    train(base, epath.Path(tmp_path / "base"), StopRequest())
    start = dict(init__workdir=str(tmp_path / "base"), train__updates=1, optim__lr=0.0)
    with pytest.raises(UserError, match="has no fitting .*recursion.* config.init.missing"):
        train(tiny_config(**start), epath.Path(tmp_path / "refused"), StopRequest())
    tuned = tiny_config(**start, init__missing="*/recursion/*")
    train(tuned, epath.Path(tmp_path / "tuned"), StopRequest())
    before, after = (layers_of_run(epath.Path(tmp_path / name)) for name in ("base", "tuned"))
    added = after.keys() - before.keys()
    assert before.keys() < after.keys() and all("/recursion/" in name for name in added)
    chex.assert_trees_all_equal({name: after[name] for name in before}, before)


def test_a_run_in_use_is_refused(tmp_path):
    run = epath.Path(tmp_path / "run")
    with claimed(run, "--mode=train", StopRequest()):
        with pytest.raises(UserError, match=f"{run} is in use: --mode=train by process"):
            train(tiny_config(), run, StopRequest())
    assert not run.exists()


def test_readers_of_a_run_change_nothing_in_it(tmp_path):
    """Not even what looks left behind: the run may be saving at this moment."""
    run, config = epath.Path(tmp_path / "run"), tiny_config(train__updates=2)
    train(config, run, StopRequest())
    for name in ("checkpoints/4.orbax-checkpoint-tmp", "checkpoints/2/tmp", ".config.json.partial-1"):
        (tmp_path / "run" / name).mkdir()

    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    before = files()
    load_run(config, run)
    load_run(tiny_config(init__workdir=str(run)), epath.Path(tmp_path / "other"))
    assert files() == before
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_run(config, run)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "other").exists()


def test_another_model_in_the_workdir_is_refused(tmp_path):
    run = epath.Path(tmp_path / "run")
    train(tiny_config(train__updates=2), run, StopRequest())
    with pytest.raises(UserError, match="config.model.width = 16, not 32"):
        train(tiny_config(train__updates=2, model__width=32), run, StopRequest())


def test_the_last_good_checkpoint_outlives_a_learning_rate_that_ruins_the_run(tmp_path, capsys):
    run = epath.Path(tmp_path / "run")
    common = dict(optim__schedule="constant", optim__warmup_steps=0, optim__clip_norm=0.0, checkpoint__every=1)
    train(tiny_config(**common, train__updates=4), run, StopRequest())
    ruinous = tiny_config(**common, train__updates=40, train__nonfinite_limit=6, optim__lr=1e30)
    with pytest.raises(UserError) as error:
        train(ruinous, run, StopRequest())
    message, said = str(error.value), capsys.readouterr().err
    first = int(re.search("first skipped update, ([0-9]+)", message)[1])
    good = first - 2  # the state after update `first` - 1 is ruined already
    assert 5 <= first <= 7 and f"The last good checkpoint is {good}, " in message and "\n" not in message
    assert f"--config.init.step={good}, and lower config.optim.lr (here 1e+30)" in message
    assert said.count("will be kept until 100 updates in a row are finite") == 1
    kept = {int(path.name) for path in (run / "checkpoints").iterdir()}
    assert kept == {good, first - 1, first + 3, first + 4}  # those before the first skipped update, and the newest two
    with pytest.raises(UserError, match=f"last good checkpoint is {good},"):  # known after a resume too
        train(ruinous, run, StopRequest())
    train(tiny_config(**common, train__updates=good + 2, init__step=good), run, StopRequest())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == good + 2 and lines[-1]["loss"] is not None and lines[-1]["skipped"] == 0
    assert {int(path.name) for path in (run / "checkpoints_set_aside").iterdir()} == kept - {good} | {first + 4}


def test_protected_checkpoints_are_deleted_once_the_run_has_recovered(tmp_path, monkeypatch):
    monkeypatch.setattr(doubt, "RECOVERED", 3)
    bad = {3, 4}

    def failing(experiment):
        step = make_train_step(experiment)

        def run(state, batch):
            number = int(state.step) + 1
            return step(state, batch | {"image": batch["image"] * (jnp.nan if number in bad else 1)})

        return run

    monkeypatch.setattr("trm_diffusion.jobs.train.make_train_step", failing)
    run = epath.Path(tmp_path / "run")
    for updates, kept in ((6, {1, 2, 5, 6}), (7, {6, 7})):
        train(tiny_config(train__updates=updates, checkpoint__every=1, optim__schedule="constant"), run, StopRequest())
        assert {int(path.name) for path in (run / "checkpoints").iterdir()} == kept
