"""Logged lines are means over the updates that were not skipped; a saved window continues as if never interrupted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.runtime.logging import WALL_CLOCK_FIELDS
from trm_diffusion.runtime.window import Window, routing_metrics


def update(index: int, *, skipped: bool = False) -> dict:
    """Metrics of one update as the training loop passes them; those of a skipped update are NaN."""
    rng = np.random.default_rng(index)
    images = np.array([3.0, 0.0, 4.0, 1.0])
    values = {
        "loss": rng.random(),
        "gradient_norm": rng.random(),
        "drop_fraction": rng.random(),
        "gate_entropy": rng.random(),
        "expert_load": rng.dirichlet([1, 1, 1]),
        "quarter_loss_sum": rng.random(4) * images,
        "quarter_images": images,
    }
    if skipped:
        values = {name: np.full_like(value, np.nan) for name, value in values.items()}
    values |= {"learning_rate": 0.1 * index, "skipped": float(skipped)}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def without_clock(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in WALL_CLOCK_FIELDS}


def test_a_line_holds_means_over_its_updates():
    window, updates = Window({}, batch_size=8), [update(index) for index in range(3)]
    for one in updates:
        window.add(one)
    line = window.line()
    assert line["updates"] == 3 and line["skipped"] == 0
    np.testing.assert_allclose(line["learning_rate"], 0.2, rtol=1e-6)  # of the last update
    for name in ("loss", "gradient_norm", "drop_fraction", "gate_entropy"):
        np.testing.assert_allclose(line[name], np.mean([one[name] for one in updates]), rtol=1e-6)
    np.testing.assert_allclose(line["expert_load"], np.mean([one["expert_load"] for one in updates], axis=0), rtol=1e-6)
    sums = sum(one["quarter_loss_sum"] for one in updates)
    np.testing.assert_allclose(line["loss_quarter_1"], sums[0] / 9, rtol=1e-6)
    np.testing.assert_allclose(line["loss_quarter_4"], sums[3] / 3, rtol=1e-6)
    assert line["loss_quarter_2"] is None  # no image fell into it
    assert set(WALL_CLOCK_FIELDS) <= line.keys() and 0 <= line["data_wait_share"] <= 1


def test_a_line_begins_a_new_window():
    window = Window({}, batch_size=8)
    window.add(update(0))
    window.line()
    window.add(update(1))
    np.testing.assert_allclose(window.line()["loss"], update(1)["loss"], rtol=1e-6)


def test_skipped_updates_are_counted_and_left_out_of_the_means():
    window = Window({}, batch_size=8)
    for one in (update(0), update(1, skipped=True), update(2, skipped=True)):
        window.add(one)
    assert window.skipped_in_a_row == 2
    window.add(update(3))
    assert window.skipped_in_a_row == 0
    line = window.line()
    assert line["updates"] == 4 and line["skipped"] == 2
    np.testing.assert_allclose(line["loss"], (update(0)["loss"] + update(3)["loss"]) / 2, rtol=1e-6)
    json.dumps(line, allow_nan=False)


def test_a_window_of_nothing_but_skipped_updates_has_no_means():
    window = Window({}, batch_size=8)
    window.add(update(0, skipped=True))
    line = window.line()
    assert line["loss"] is None and line["loss_quarter_1"] is None and line["skipped"] == 1
    window.add(update(1, skipped=True))
    assert window.skipped_in_a_row == 2  # counted in a row across lines, too


@pytest.mark.parametrize("cut", range(6))
def test_a_record_through_json_goes_on_as_if_never_interrupted(cut):
    updates = [update(index, skipped=index in (1, 4)) for index in range(6)]
    whole, parts = Window({}, batch_size=8), Window({}, batch_size=8)
    for index, one in enumerate(updates):
        if index == cut:
            parts = Window(json.loads(json.dumps(parts.record())), batch_size=8)
        whole.add(one)
        parts.add(one)
        assert parts.skipped_in_a_row == whole.skipped_in_a_row
        if index == 2:
            assert without_clock(parts.line()) == without_clock(whole.line())
    assert without_clock(parts.line()) == without_clock(whole.line())  # to the last bit


def test_routing_metrics_average_over_the_latent_steps_that_ran():
    ran = jnp.array([[1.0, 0.0, 1.0]])  # [R, T]: the second did not run: all zeros
    load = jnp.array([[[[0.25, 0.75]], [[0.0, 0.0]], [[0.75, 0.25]]]])  # [R, T, P, M]
    others = dict.fromkeys(RoutingReport._fields, jnp.zeros_like(ran))
    report = RoutingReport(**others | dict(load=load, drop_fraction=0.1 * ran, entropy=0.6 * ran, ran=ran))
    metrics = routing_metrics(report)
    np.testing.assert_allclose(metrics["expert_load"], [0.5, 0.5])
    np.testing.assert_allclose(metrics["drop_fraction"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(metrics["gate_entropy"], 0.6, rtol=1e-6)
    assert routing_metrics(None) == {}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(metrics))
