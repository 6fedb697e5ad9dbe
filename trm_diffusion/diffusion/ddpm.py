"""DDPM: noise prediction on a chain of betas, with improved DDPM's learned variances."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.diffusion import gaussian
from trm_diffusion.diffusion.objective import (
    DiffusionConfig,
    Objective,
    Prediction,
    at_least_float32,
    check_diffusion_steps,
    mean_per_sample,
    per_sample,
)


class DDPM(Objective):
    """Noise prediction on linear betas (Ho et al. 2020), optionally with improved DDPM's learned variances.

    Times are levels 0 ... timesteps: level 0 is clean data (alpha_bar = 1), level l is timestep index l - 1,
    and x_l = sqrt(alpha_bar_l) x_0 + sqrt(1 - alpha_bar_l) noise. The output is the noise; with
    learned_sigma it is followed, along the channels, by v, which gives the variance_fraction (v + 1) / 2.
    """

    name = "ddpm"

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        betas = np.linspace(config.beta_start, config.beta_end, config.timesteps)  # [T]
        alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])  # [T + 1], indexed by level like all tables
        self._signal, self._sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
        self._clock = self._sigma / self._signal
        chain = gaussian.posterior(self._signal[1:], self._sigma[1:], self._signal[:-1], self._sigma[:-1])
        # Level 0 has no transition below it; its entry is never read. The posterior variance of level 1 is 0, so
        # its log-variance is taken from level 2, which keeps the learned range finite there.
        by_level = {field: np.concatenate([[0.0], values]) for field, values in chain._asdict().items()}
        self._clean_weight, self._noisy_weight = by_level["clean_weight"], by_level["noisy_weight"]
        self._log_variance = np.log(chain.variance[np.maximum(np.arange(-1, config.timesteps), 1)])
        self._log_beta = np.log(np.concatenate([betas[:1], betas]))

    def _at(self, table: np.ndarray, times):
        return jnp.asarray(table, times.dtype)[times.astype(jnp.int32)]  # [B]

    def sample_times(self, key, count: int):
        return jax.random.randint(key, (count,), 1, self.config.timesteps + 1).astype(jnp.float32)

    def normalized(self, times):
        return times / self.config.timesteps

    def network_times(self, times):
        return times - 1.0

    def signal_and_sigma(self, times):
        return self._at(self._signal, times), self._at(self._sigma, times)

    def loss(self, output, clean, noise, noisy, times):
        """Mean squared error of the noise; with learned_sigma plus the variational bound, which trains only
        the variance (L_hybrid of Nichol and Dhariwal 2021, with DiT's weight of 1)."""
        prediction = self.predict(output, noisy, times)
        error = mean_per_sample((prediction.noise - at_least_float32(noise)) ** 2)  # [B]
        if not self.config.learned_sigma:
            return error
        frozen = jax.tree.map(jax.lax.stop_gradient, prediction)
        frozen = frozen._replace(variance_fraction=prediction.variance_fraction)
        return error + self.variational_bound(frozen, clean, noisy, times)  # [B]

    def variational_bound(self, prediction: Prediction, clean, noisy, times):
        """The bound's term at each sample's level, [B], in bits per dimension.

        KL from the true to the predicted transition; at level 1 the discretized likelihood of the data instead.

        With config.normal_cdf tanh this is the term of the published code of improved DDPM and DiT.
        """
        clean, noisy = at_least_float32(clean), at_least_float32(noisy)
        clean_weight, noisy_weight, smallest, largest = (
            per_sample(self._at(table, times), noisy)
            for table in (self._clean_weight, self._noisy_weight, self._log_variance, self._log_beta)
        )
        fraction = prediction.variance_fraction
        log_variance = fraction * largest + (1.0 - fraction) * smallest  # [B, ..., C]
        mean = clean_weight * prediction.clean + noisy_weight * noisy
        true_mean = clean_weight * clean + noisy_weight * noisy
        divergence = gaussian.normal_kl(true_mean, smallest, mean, log_variance)
        surprise = -gaussian.discretized_log_likelihood(clean, mean, log_variance, self.config.normal_cdf)
        nats = jnp.where(times == 1, mean_per_sample(surprise), mean_per_sample(divergence))
        return nats / math.log(2.0)

    def predict(self, output, noisy, times) -> Prediction:
        output, noisy = at_least_float32(output), at_least_float32(noisy)
        channels = noisy.shape[-1]
        if output.shape[-1] != self.output_channels(channels):
            raise ValueError(
                f"the network returned {output.shape[-1]} channels for data with {channels}; "
                f"this objective needs {self.output_channels(channels)}"
            )
        noise = output[..., :channels]
        fraction = (output[..., channels:] + 1.0) / 2.0 if self.config.learned_sigma else None
        signal, sigma = (per_sample(values, noisy) for values in self.signal_and_sigma(times))
        return Prediction(clean=(noisy - sigma * noise) / signal, noise=noise, variance_fraction=fraction)

    def time_grid(self, diffusion_steps: int) -> np.ndarray:
        """Improved DDPM's respacing: timestep indices 0, k, 2k, ... T - 1 with a fractional stride k, rounded.

        A single diffusion step starts at the noisiest level."""
        timesteps = self.config.timesteps
        check_diffusion_steps(diffusion_steps, timesteps)
        if diffusion_steps == 1:
            return np.array([timesteps, 0.0])
        strides = np.full(diffusion_steps - 1, (timesteps - 1) / (diffusion_steps - 1))
        # A running sum, not a product: halves then round to the same side as in the published code.
        indices = np.round(np.concatenate([[0.0], np.cumsum(strides)]))  # [n]
        return np.concatenate([indices[::-1] + 1.0, [0.0]])  # [n + 1] levels

    def scale(self, times):
        return self._at(self._signal, times)

    def clock(self, times):
        return self._at(self._clock, times)

    def direction(self, prediction: Prediction):
        return prediction.noise
