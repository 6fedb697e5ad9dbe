"""Shared by the tests of noise schedules, guidance and samplers."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    """Broadcasting [B] with [B, ..., C] by accident is an error here."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def float64():
    """Uses float64 arrays, so that truncation error is well above rounding error."""
    with jax.enable_x64(True):
        yield
