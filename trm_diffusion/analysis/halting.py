"""The share of the latent steps that halting saves: of what tokens ask for, and of what is computed.

A row is one token's update by one expert, of each of q, k and v. A running token asks for k rows at each latent step,
and at the first latent step every token does: one that has stopped shows others its keys and values.
At inference the experts are computed for every token and masked (models/recursion/dispatch.py), so a latent step that
runs computes M rows per token, however many tokens ask for them. Halting saves none of these, except in latent steps
that are skipped because every token of the batch has stopped.
"""

import numpy as np

from trm_diffusion.models.recursion.report import RoutingReport


def mean_latent_steps(reports: RoutingReport) -> np.ndarray:
    """Latent steps per token, [...] from reports [..., T]: those it ran, and the last, which is computed for all."""
    return np.asarray(reports.running, np.float64).sum(-1)


def expert_rows(reports: RoutingReport, *, experts_per_token: int) -> dict[str, float]:
    """Rows per token and network evaluation, summed over blocks, from reports [S, R, T, ...] of S diffusion steps."""
    running, ran = (np.asarray(leaf, np.float64) for leaf in (reports.running, reports.ran))
    _, blocks, latent_steps, _, experts = np.shape(reports.load)
    asking = np.concatenate([ran[..., :1], running[..., 1:]], axis=-1)
    asked, computed = asking.sum((1, 2)).mean() * experts_per_token, ran.sum((1, 2)).mean() * experts
    asked_at_most, computed_at_most = (blocks * latent_steps * rows for rows in (experts_per_token, experts))
    return {
        "asked": asked,
        "asked_without_halting": asked_at_most,
        "asked_saved_share": 1 - asked / asked_at_most,
        "computed": computed,
        "computed_without_halting": computed_at_most,
        "computed_saved_share": 1 - computed / computed_at_most,
    }


def saving(rows: dict[str, float]) -> str:
    """What part of the computation halting saved, in words."""
    if rows["computed_saved_share"] > 0:
        return "whole latent steps, those before which every token of the batch had stopped; nothing else"
    return "nothing: some token of the batch ran to the last latent step every time, and stopped ones are masked"
