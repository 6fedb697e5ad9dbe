"""The benchmark of the training step: its yardstick computes what we compute, and its judgements follow the figures."""

import jax
import numpy as np
import pytest

from benchmarks import plain_dit, train_step
from trm_diffusion.train import make_train_step


@pytest.fixture(autouse=True)
def plain_jax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_the_plain_step_is_ours():
    built, batch = train_step.tiny_dit(), train_step.tiny_batch()
    state, ours, plain = built.fresh_state(), make_train_step(built), train_step.plain_step(built)
    plain_state = plain_dit.initial_state(state.parameters)
    for _ in range(3):
        state, metrics = ours(state, batch)
        plain_state, loss = plain(plain_state, batch["image"], batch["label"])
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-5)
    (average,) = state.ema.values()
    for theirs, own in ((plain_state.parameters, state.parameters), (plain_state.average, average)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), theirs, own)


def test_figures_of_this_machine():
    sizes = train_step.Sizes(depth=1, images=2, repeats=1, calls=2)
    found = train_step.here(sizes)
    assert found["train_step_over_forward"] > 1 and found["images_per_second"] > 0
    found = train_step.dispatch(sizes)
    assert found["ours_over_plain_jax"] > 0 and found["pass"] is (found["ours_over_plain_jax"] <= 1.5)


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
