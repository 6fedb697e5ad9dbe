"""The benchmark against PyTorch compares equal models, and runs."""

from benchmarks.train_step import Sizes, vs_torch


def test_the_models_are_equal():
    found = vs_torch(Sizes(depth=1, images=2, repeats=1))
    assert found["forward"]["speed_over"]["pytorch"] > 0 and found["train_step"]["seconds"]["pytorch"] > 0
    assert found["pass"] is all(found["met"].values())
