"""Rectified flow: straight paths from data to noise."""

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.diffusion.objective import (
    Objective,
    Prediction,
    at_least_float32,
    check_diffusion_steps,
    mean_per_sample,
    per_sample,
)

FLOW_EMBEDDING_SCALE = 1000.0  # sinusoidal timestep embeddings expect 0 .. 1000


class RectifiedFlow(Objective):
    """Straight paths from data to noise (Liu et al. 2022; SiT and SD3's linear path).

    Times are t in [0, 1], x_t = (1 - t) x_0 + t noise, and the output is the velocity noise - x_0,
    unless `convention` says otherwise.
    """

    name = "rectified_flow"

    def _shifted(self, times):
        shift = self.config.shift  # Esser et al. 2024 (SD3), equation 23
        return shift * times / (1.0 + (shift - 1.0) * times)

    def _velocity(self, output, channels: int):
        """noise - x_0 [B, ..., C] from the network's output."""
        velocity = at_least_float32(output[..., :channels])
        return -velocity if self.config.convention == "sit" else velocity

    def sample_times(self, key, count: int):
        if self.config.time_distribution == "uniform":
            times = jax.random.uniform(key, (count,), jnp.float32)
        else:
            normal = jax.random.normal(key, (count,), jnp.float32)
            times = jax.nn.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
        return self._shifted(times)  # [count]

    def normalized(self, times):
        return times

    def network_times(self, times):
        return 1.0 - times if self.config.convention == "sit" else FLOW_EMBEDDING_SCALE * times

    def signal_and_sigma(self, times):
        return 1.0 - times, times

    def loss(self, output, clean, noise, noisy, times):
        velocity = at_least_float32(noise) - at_least_float32(clean)  # [B, ..., C]
        return mean_per_sample((self._velocity(output, clean.shape[-1]) - velocity) ** 2)  # [B]

    def predict(self, output, noisy, times) -> Prediction:
        velocity = self._velocity(output, noisy.shape[-1])
        noisy = at_least_float32(noisy)
        times = per_sample(times, noisy)
        return Prediction(clean=noisy - times * velocity, noise=noisy + (1.0 - times) * velocity)

    def time_grid(self, diffusion_steps: int) -> np.ndarray:
        check_diffusion_steps(diffusion_steps)
        return self._shifted(np.linspace(1.0, 0.0, diffusion_steps + 1))

    def scale(self, times):
        return jnp.ones_like(times)

    def clock(self, times):
        return times

    def direction(self, prediction: Prediction):
        return prediction.noise - prediction.clean
