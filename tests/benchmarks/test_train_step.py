"""The training step benchmark: its reference step computes the same as ours, and its verdicts follow the figures."""

import jax
import numpy as np
import pytest

from benchmarks import train_step


@pytest.fixture(autouse=True)
def plain_jax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_plain_step_is_ours():
    programs = train_step.TinyPrograms()
    for _ in range(3):
        np.testing.assert_allclose(programs.plain(1), programs.ours(1), rtol=1e-5)
    state, plain_state = programs.state, programs.plain_state
    (average,) = state.ema.values()
    for theirs, ours in ((plain_state.parameters, state.parameters), (plain_state.average, average)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), theirs, ours)
    found = train_step.dispatch(programs, train_step.Sizes(repeats=1, calls=2))
    assert found["ours_over_plain_jax"] > 0 and found["pass"] is (found["ours_over_plain_jax"] <= 1.5)


def test_figures_of_this_machine():
    found = train_step.here(train_step.Sizes(depth=1, images=2, repeats=1))
    assert found["train_step_over_forward"] > 0 and found["images_per_second"] > 0


def test_figures_of_an_accelerator_are_over_the_step_without_recursion():
    found = train_step.accelerator(train_step.Sizes(model="S/8", images=8, repeats=1), steps=1, blocks="0", depth=1)
    assert found["model"] == "DiT-S/8, bfloat16, 8 images" and found["rows"].keys() == train_step.ON_ACCELERATOR.keys()
    assert found["rows"]["without_recursion"]["over_without_recursion"] == 1
    assert all(row["milliseconds"] > 0 for row in found["rows"].values())
