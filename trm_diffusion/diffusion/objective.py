"""What the network predicts and what its output means: the interface of DDPM and rectified flow.

Data are channels last, [B, ..., C], and every objective mixes them with noise as
x_t = signal(t) x_0 + sigma(t) noise. Schedules are float64 NumPy tables. Coefficients have the dtype of the
given times. Data are processed in float32, or in float64 if they are float64.
"""

import abc
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.diffusion.gaussian import NORMAL_CDFS
from trm_diffusion.models.settings import Settings, setting

OBJECTIVES = {  # name in the config: its class
    "ddpm": "trm_diffusion.diffusion.ddpm:DDPM",
    "rectified_flow": "trm_diffusion.diffusion.rectified_flow:RectifiedFlow",
}


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Settings):
    """The objective and its schedule. A value out of range raises ValueError, in one line."""

    objective: str = setting("rectified_flow", choices=OBJECTIVES)
    learned_sigma: bool = False  # ddpm: half of the output is the variance; L_hybrid. sit: that half is not used
    timesteps: int = setting(1000, least=2)  # ddpm: noise levels trained on
    beta_start: float = setting(1e-4, above=0, below=1)  # ddpm: variance added at the first level
    beta_end: float = setting(0.02, above=0, below=1)  # ddpm: variance added at the last level, linear in between
    # ddpm with learned_sigma: distribution function of the normal in the likelihood at timestep 0; tanh as published
    normal_cdf: str = setting("tanh", choices=NORMAL_CDFS)
    # rectified_flow: the training times
    time_distribution: str = setting("logit_normal", choices=("logit_normal", "uniform"))
    logit_mean: float = 0.0  # logit_normal: mean of log(t / (1 - t)); above 0 favours noise
    logit_std: float = setting(1.0, above=0)  # logit_normal: its standard deviation
    # rectified_flow: the network gets 1000 t and predicts noise - data (sd3), or gets 1 - t and predicts data - noise,
    # as in the published SiT weights (sit)
    convention: str = setting("sd3", choices=("sd3", "sit"))
    shift: float = setting(1.0, above=0)  # rectified_flow: t -> s t / (1 + (s - 1) t), in training and sampling

    def __post_init__(self):
        super().__post_init__()
        if self.learned_sigma and self.objective != "ddpm" and self.convention != "sit":
            raise ValueError("learned_sigma needs objective ddpm: a flow has no variance to learn")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} exceeds beta_end {self.beta_end}")


class Prediction(NamedTuple):
    """A network's estimates for a noisy input; perturbing `clean` with `noise` gives that input back."""

    clean: jax.Array  # [B, ..., C] estimate of x_0
    noise: jax.Array  # [B, ..., C] estimate of the noise
    # [B, ..., C] or None: 1 is the largest log-variance of an ancestral transition, 0 the smallest, and other
    # values interpolate (or extrapolate). It is a fraction because both ends depend on the sampled chain.
    variance_fraction: jax.Array | None = None


class Objective(abc.ABC):
    """The interface of every objective. `times` [B] are in the objective's own unit; larger is noisier."""

    name: str  # its name in `OBJECTIVES`

    def __init__(self, config: DiffusionConfig):
        self.config = config

    def output_channels(self, channels: int) -> int:
        """Channels that the network must produce for data of `channels` channels."""
        return 2 * channels if self.config.learned_sigma else channels

    def perturb(self, clean: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """x_t = signal x_0 + sigma noise, [B, ..., C]."""
        signal, sigma = self.signal_and_sigma(times)
        return per_sample(signal, clean) * at_least_float32(clean) + per_sample(sigma, noise) * at_least_float32(noise)

    @abc.abstractmethod
    def sample_times(self, key: jax.Array, count: int) -> jax.Array:
        """Training times, [count] float32."""

    @abc.abstractmethod
    def normalized(self, times: jax.Array) -> jax.Array:
        """[B] in [0, 1]: 0 is clean, 1 is pure noise."""

    @abc.abstractmethod
    def network_times(self, times: jax.Array) -> jax.Array:
        """[B] floats: the input of the network's timestep embedding."""

    @abc.abstractmethod
    def signal_and_sigma(self, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two coefficients, [B] each, of x_t = signal x_0 + sigma noise."""

    @abc.abstractmethod
    def loss(self, output, clean, noise, noisy, times) -> jax.Array:
        """[B] per-sample loss of the network's `output` [B, ..., output_channels] at `noisy` [B, ..., C]."""

    @abc.abstractmethod
    def predict(self, output: jax.Array, noisy: jax.Array, times: jax.Array) -> Prediction:
        """Converts the network's output to clean data and noise."""

    @abc.abstractmethod
    def time_grid(self, diffusion_steps: int) -> np.ndarray:
        """[diffusion_steps + 1] float64, from pure noise down to clean."""

    # The probability-flow ODE, in the coordinates where the objective makes it simplest:
    # z = x / scale(t) obeys dz/du = direction(prediction) with u = clock(t).

    @abc.abstractmethod
    def scale(self, times: jax.Array) -> jax.Array:
        """[B], never 0."""

    @abc.abstractmethod
    def clock(self, times: jax.Array) -> jax.Array:
        """[B], 0 at clean, growing with noise."""

    @abc.abstractmethod
    def direction(self, prediction: Prediction) -> jax.Array:
        """dz/du, [B, ..., C]."""


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """[B] reshaped to [B, 1, ..., 1], to broadcast with `like` [B, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def at_least_float32(array: jax.Array) -> jax.Array:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def mean_per_sample(array: jax.Array) -> jax.Array:
    return array.mean(axis=tuple(range(1, array.ndim)))  # [B, ...] -> [B]


def check_diffusion_steps(diffusion_steps: int, largest: float = math.inf):
    if not 1 <= diffusion_steps <= largest:
        limit = "at least 1" if largest == math.inf else f"between 1 and the {largest} timesteps trained on"
        raise ValueError(f"diffusion_steps is {diffusion_steps}; it must be {limit}")
