"""Keeping the experts in use: none by default (the paper names no balance loss), and three remedies.

    switch   M sum_m load_m importance_m per choice and latent step (Switch Transformer); 1 at perfect balance
    z        mean logsumexp(logits)^2 (ST-MoE router z-loss), which keeps the logits small
    bias     loss-free (arXiv 2408.15664): a bias per expert is added to z for the selection only. After each update it
             rises by `rate` for experts that got less than their share, and falls for those that got more

All statistics are means over all tokens of the batch, on all devices.
"""

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.models.stack import StackLayout, segment_of


def auxiliary_loss(reports: RoutingReport | None, config: RecursionConfig) -> jax.Array:
    """The loss terms of the gates and the halting heads, added to the diffusion loss, float32 []."""
    loss = jnp.zeros(())
    if reports is None:
        return loss
    if config.switch_loss_weight:
        loss += config.switch_loss_weight * switch_loss(reports)
    if config.z_loss_weight:
        loss += config.z_loss_weight * z_loss(reports)
    if config.halting == "learned":
        loss += config.halting_weight * jnp.mean(jnp.sum(reports.halting_divergence, axis=-1))
    return loss


def switch_loss(reports: RoutingReport) -> jax.Array:
    """Mean over blocks, choices and the latent steps that ran, float32 []. Only the importance passes a gradient."""
    experts = reports.load.shape[-1]
    each = experts * jnp.sum(jax.lax.stop_gradient(reports.load) * reports.importance, axis=-1)  # [R, T, P]
    return _mean_over_ran(jnp.mean(each, axis=-1), reports)


def z_loss(reports: RoutingReport) -> jax.Array:
    """Mean over blocks and the latent steps that ran, float32 []."""
    return _mean_over_ran(reports.squared_logsumexp, reports)


def _mean_over_ran(values_rt: jax.Array, reports: RoutingReport) -> jax.Array:
    return jnp.sum(values_rt * reports.ran) / jnp.sum(reports.ran)


def moved_biases(biases: dict, reports: RoutingReport, layout: StackLayout, config: RecursionConfig) -> dict:
    """The biases by path after one update: b + rate * sign(1 / M - load), with the rate `config.balance_bias_rate`.

    layout: where the blocks are in the model's parameters. The reports' leading axis is the recursive blocks in order.
    """
    moved = {}
    for name, bias in biases.items():
        first, length = layout.segments[segment_of(name)]
        row = layout.recursive.index(first)
        # The load of a latent step that did not run is zero.
        load, ran = reports.load[row : row + length], reports.ran[row : row + length, :, None, None]  # [L, T, P, M]
        if config.pool == "shared":
            load, ran = jnp.sum(load, axis=1), jnp.sum(ran, axis=1)  # [L, P, M]
        step = config.balance_bias_rate * jnp.sign(ran / load.shape[-1] - load)
        moved[name] = bias + step.reshape(bias.shape)
    return moved
