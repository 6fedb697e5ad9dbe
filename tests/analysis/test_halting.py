"""The savings of halting, compared with counts by hand."""

import numpy as np
import pytest

from trm_diffusion.analysis.halting import expert_rows, mean_latent_steps, saving
from trm_diffusion.models.recursion.report import RoutingReport

# Two diffusion steps, one block, four latent steps, two of five experts a token.
RUNNING = np.array([[[1.0, 0.5, 0.0, 1.0]], [[1.0, 0.5, 0.25, 1.0]]])
RAN = np.array([[[1.0, 1.0, 0.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]]])


def report(running, ran):
    fields = dict.fromkeys(RoutingReport._fields)
    return RoutingReport(**fields | dict(running=running, ran=ran, load=np.zeros((*running.shape, 1, 5))))


def test_mean_latent_steps():
    np.testing.assert_allclose(mean_latent_steps(report(RUNNING, RAN)), [[2.5], [2.75]])


def test_rows_asked_for_and_rows_computed():
    rows = expert_rows(report(RUNNING, RAN), experts_per_token=2)
    assert rows["asked"] == pytest.approx((2.5 + 2.75) / 2 * 2) and rows["asked_without_halting"] == 4 * 2
    assert rows["computed"] == (3 + 4) / 2 * 5 and rows["computed_without_halting"] == 4 * 5
    assert rows["asked_saved_share"] == pytest.approx(1 - 5.25 / 8)
    assert rows["computed_saved_share"] == pytest.approx(1 / 8)
    assert saving(rows).startswith("whole latent steps")


def test_where_a_token_always_runs_on_nothing_is_saved():
    rows = expert_rows(report(np.maximum(RUNNING, 0.01), np.ones_like(RAN)), experts_per_token=1)
    assert rows["asked_saved_share"] > 0.3 and rows["computed_saved_share"] == 0
    assert saving(rows).startswith("nothing")


def test_a_token_that_stops_at_once_has_asked_for_the_rows_of_its_keys_and_values():
    stopped_at_once = report(np.array([[[0.25, 0.25, 1.0]]]), np.ones((1, 1, 3)))
    assert expert_rows(stopped_at_once, experts_per_token=2)["asked"] == pytest.approx((1 + 0.25 + 1) * 2)
    np.testing.assert_allclose(mean_latent_steps(stopped_at_once), [[1.5]])
