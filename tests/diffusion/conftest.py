"""Shared by the tests of noise schedules, guidance and samplers."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    """A [B] meeting a [B, ..., C] by accident is an error here."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def float64():
    """Arrays of this test are float64, so that truncation error is seen well above rounding."""
    with jax.enable_x64(True):
        yield
