"""Classifier-free guidance (Ho and Salimans 2022): turns a conditional network into the one that a sampler calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trm_diffusion.diffusion.objective import Objective, at_least_float32, per_sample

GUIDED_CHANNELS = ("all", "dit3")
DIT3_CHANNELS = 3  # the published DiT guides the first three of its four latent channels


def check_guidance(interval: tuple[float, float], channels: str):
    """Raises ValueError, in one line, for an invalid interval or choice of channels."""
    if channels not in GUIDED_CHANNELS:
        raise ValueError(f"guidance channels are {channels!r}; choose one of {', '.join(GUIDED_CHANNELS)}")
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"guidance interval is ({low}, {high}); it must satisfy 0 <= low <= high <= 1")


def combine(
    conditional,
    unconditional,
    normalized_times,
    *,
    scale: float,
    data_channels: int,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: str = "all",
) -> jax.Array:
    """uncond + scale * (cond - uncond) on the guided channels; the conditional output everywhere else.

    conditional, unconditional [B, ..., output channels]; normalized_times [B] in [0, 1]. Guidance applies where
    low <= normalized time <= high (Kynkaanniemi et al. 2024), on all `data_channels` or, with "dit3", on the
    first three. Channels past `data_channels` (learned variances) are always conditional.
    """
    check_guidance(interval, channels)
    conditional, unconditional = at_least_float32(conditional), at_least_float32(unconditional)
    guided_channels = data_channels if channels == "all" else min(DIT3_CHANNELS, data_channels)
    low, high = interval
    inside = (low <= normalized_times) & (normalized_times <= high)  # [B]
    # Equal to uncond + scale (cond - uncond), but starts from the conditional output: a gain of 0 changes no bit.
    gain = per_sample(jnp.where(inside, scale - 1.0, 0.0).astype(conditional.dtype), conditional)
    head = conditional[..., :guided_channels]
    guided = head + gain * (head - unconditional[..., :guided_channels])
    return jnp.concatenate([guided, conditional[..., guided_channels:]], axis=-1)


def guide(
    network: Callable,
    objective: Objective,
    condition: Any,
    null_condition: Any = None,
    *,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: str = "all",
) -> Callable:
    """Turns network(noisy, network_times, condition) into a sampler's network(noisy, times) -> (output, aux).

    condition and null_condition are pytrees of the same structure with leaves [B, ...]. Both are evaluated in one
    batch of 2B, null second, and aux is returned unchanged for that batch. `scale` is a Python number. At 1 only
    the condition is evaluated: null_condition is not read, and aux is for a batch of B.
    """
    check_guidance(interval, channels)

    def conditional_network(noisy, times):
        return network(noisy, objective.network_times(times), condition)

    def guided_network(noisy, times):
        twice = jnp.concatenate([noisy, noisy])  # [2B, ..., C]
        network_times = jnp.tile(objective.network_times(times), 2)  # [2B]
        both = jax.tree.map(lambda given, null: jnp.concatenate([given, null]), condition, null_condition)
        output, aux = network(twice, network_times, both)
        conditional, unconditional = jnp.split(output, 2)  # [B, ..., output channels] each
        output = combine(
            conditional,
            unconditional,
            objective.normalized(times),
            scale=scale,
            data_channels=noisy.shape[-1],
            interval=interval,
            channels=channels,
        )
        return output, aux

    return conditional_network if scale == 1 else guided_network
