"""DDIM: eta interpolates between the probability flow and the ancestral chain."""

import jax.numpy as jnp

from trm_diffusion.diffusion import gaussian
from trm_diffusion.diffusion.objective import per_sample
from trm_diffusion.diffusion.samplers.base import SingleEvaluationSampler


class DDIM(SingleEvaluationSampler):
    """x_s = signal_s x_0 + sqrt(sigma_s^2 - eta^2 v) noise + eta sqrt(v) fresh noise; v: posterior variance.

    Song et al. 2020 (DDIM), equations 12 and 16. With eta 0 it is deterministic and draws no noise; with eta 1 it is
    ancestral sampling with the posterior variance.
    """

    takes_eta = True

    def update(self, noisy, prediction, times, next_times, draw_noise):
        if self.eta == 0.0:
            return self.objective.perturb(prediction.clean, prediction.noise, next_times)
        signal, sigma, next_signal, next_sigma = (
            per_sample(values, noisy)
            for values in (*self.objective.signal_and_sigma(times), *self.objective.signal_and_sigma(next_times))
        )
        variance = self.eta**2 * gaussian.posterior(signal, sigma, next_signal, next_sigma).variance
        kept = jnp.sqrt(jnp.maximum(next_sigma**2 - variance, 0.0))  # rounding may give -1e-9 instead of 0
        return next_signal * prediction.clean + kept * prediction.noise + jnp.sqrt(variance) * draw_noise()
