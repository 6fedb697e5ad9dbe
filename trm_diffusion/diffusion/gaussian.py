"""Closed forms for Gaussians, shared by objectives and samplers."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PIXEL_HALF_WIDTH = 1.0 / 255.0  # half of an 8-bit bin when 0..255 is mapped to [-1, 1]
EDGE_PIXEL = 0.999  # values beyond it belong to the first or last bin, which extends to infinity
PROBABILITY_FLOOR = 1e-12  # keeps the log finite, with zero gradient, where the mass vanishes in float32


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(clean_weight * x_0 + noisy_weight * x_t, variance), for s cleaner than t.

    Each field has the shape of the levels it was computed from."""

    clean_weight: Any
    noisy_weight: Any
    variance: Any
    forward_variance: Any  # of q(x_t | x_s): the beta of this transition


def posterior(signal, sigma, cleaner_signal, cleaner_sigma) -> Posterior:
    """The posterior between two levels of x = signal * x_0 + sigma * noise, at t and at a cleaner s.

    With r = signal / cleaner_signal, q(x_t | x_s) = N(r x_s, sigma^2 - r^2 cleaner_sigma^2), and Bayes gives
    the rest. For adjacent levels with signal^2 + sigma^2 = 1 these are equations 6 and 7 of Ho et al. 2020
    (DDPM). Plain arithmetic: NumPy arrays stay float64, JAX arrays stay traced.
    """
    ratio = signal / cleaner_signal
    # Equal to 1 - alpha_bar_t / alpha_bar_s when signal^2 + sigma^2 = 1, but in float32 that difference cancels
    # where beta is 1e-4; here the subtracted term is never close to the first.
    forward_variance = sigma**2 - (ratio * cleaner_sigma) ** 2
    return Posterior(
        clean_weight=cleaner_signal * forward_variance / sigma**2,
        noisy_weight=ratio * cleaner_sigma**2 / sigma**2,
        variance=forward_variance * cleaner_sigma**2 / sigma**2,
        forward_variance=forward_variance,
    )


def normal_kl(mean, log_variance, other_mean, other_log_variance):
    """KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance))), elementwise, in nats."""
    ratio = jnp.exp(log_variance - other_log_variance)
    squared = (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
    return 0.5 * (ratio + squared - 1.0 + other_log_variance - log_variance)


def tanh_normal_cdf(x):
    """The normal distribution function as the published code of improved DDPM and DiT approximates it, elementwise.

    It is (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), here as a sigmoid, which keeps its relative
    precision on the lower tail.
    """
    return jax.nn.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


NORMAL_CDFS = {"tanh": tanh_normal_cdf, "exact": jax.scipy.special.ndtr}  # both symmetric: F(-x) = 1 - F(x)


def discretized_log_likelihood(value, mean, log_variance, normal_cdf: str = "tanh"):
    """Log of the mass that a Gaussian gives to the 8-bit bin around `value`, elementwise, in nats.

    Bins are 2/255 wide on [-1, 1] and the two outermost are unbounded (Ho et al. 2020, equation 13).
    normal_cdf: the distribution function, by its name in `NORMAL_CDFS`.
    """
    cdf, deviation = NORMAL_CDFS[normal_cdf], jnp.exp(0.5 * log_variance)
    centred = value - mean
    # Both arguments are on the lower tail, where the distribution function keeps its relative precision.
    distance = -jnp.abs(centred)
    inner = cdf((distance + PIXEL_HALF_WIDTH) / deviation) - cdf((distance - PIXEL_HALF_WIDTH) / deviation)
    lowest = cdf((centred + PIXEL_HALF_WIDTH) / deviation)
    highest = cdf(-(centred - PIXEL_HALF_WIDTH) / deviation)
    mass = jnp.where(value < -EDGE_PIXEL, lowest, jnp.where(value > EDGE_PIXEL, highest, inner))
    return jnp.log(jnp.maximum(mass, PROBABILITY_FLOOR))
