"""The benchmark of the training step: its yardstick computes what we compute, and its judgements follow the figures."""

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


def test_every_target_for_the_tpu_must_be_met():
    within = {name: dict(most) for name, most in train_step.TPU_TARGETS.items()}
    found = {"remat": within, "compile_seconds_in_a_loop": 20.0}
    assert train_step.judged_for_tpu(found)["pass"]
    for policy, most in train_step.TPU_TARGETS.items():
        for name, value in most.items():
            for wrong in (1.01 * value, -1.0):
                worse = {**within, policy: {**within[policy], name: wrong}}
                assert not train_step.judged_for_tpu({**found, "remat": worse})["pass"]
    assert not train_step.judged_for_tpu({**found, "compile_seconds_in_a_loop": 21.0})["pass"]
    assert train_step.judged_for_tpu({"not_measured": "why"}) == {"not_measured": "why"}
