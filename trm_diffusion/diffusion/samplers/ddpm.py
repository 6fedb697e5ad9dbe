"""Ancestral sampling: DDPM's own reverse chain."""

import jax.numpy as jnp

from trm_diffusion.diffusion import gaussian
from trm_diffusion.diffusion.objective import per_sample
from trm_diffusion.diffusion.samplers.base import SingleEvaluationSampler


class Ancestral(SingleEvaluationSampler):
    """A draw from p(x_s | x_t), DDPM's reverse transition on the sampled chain (Ho et al. 2020).

    The mean is the posterior mean at the predicted data. The variance is the posterior variance (the smaller of the
    paper's two) or, if predicted, a log-space interpolation between that and this chain's beta. The last transition, to
    clean data, adds no noise.
    """

    objectives = ("ddpm",)  # a flow has no chain of betas

    def update(self, noisy, prediction, times, next_times, draw_noise):
        signal, sigma, next_signal, next_sigma = (
            per_sample(values, noisy)
            for values in (*self.objective.signal_and_sigma(times), *self.objective.signal_and_sigma(next_times))
        )
        transition = gaussian.posterior(signal, sigma, next_signal, next_sigma)
        mean = transition.clean_weight * prediction.clean + transition.noisy_weight * noisy
        is_last = next_sigma == 0.0
        log_beta = jnp.log(transition.forward_variance)
        log_variance = jnp.where(is_last, log_beta, jnp.log(jnp.where(is_last, 1.0, transition.variance)))
        if prediction.variance_fraction is not None:
            log_variance = log_variance + prediction.variance_fraction * (log_beta - log_variance)
        return mean + jnp.where(is_last, 0.0, jnp.exp(0.5 * log_variance)) * draw_noise()
