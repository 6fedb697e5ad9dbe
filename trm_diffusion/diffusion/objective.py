"""What the network is asked to predict and what its answer means: DDPM and rectified flow, one contract.

Data are channels last, [B, ..., C], and every objective mixes them with noise as
x_t = signal(t) x_0 + sigma(t) noise. Schedules are float64 NumPy tables; a coefficient takes the dtype of the
times it is asked for, and data are computed in float32 or, when given so, float64.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.diffusion import gaussian

OBJECTIVES = ("ddpm", "rectified_flow")
TIME_DISTRIBUTIONS = ("logit_normal", "uniform")
CONVENTIONS = ("sd3", "sit")
FLOW_EMBEDDING_SCALE = 1000.0  # the range that sinusoidal timestep embeddings were made for


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The objective and its schedule. A value out of range raises ValueError, in one line."""

    objective: str = "rectified_flow"  # "ddpm" or "rectified_flow"
    learned_sigma: bool = False  # ddpm: half the output names the variance; L_hybrid. sit: half of it is not used
    timesteps: int = 1000  # ddpm: noise levels trained on
    beta_start: float = 1e-4  # ddpm: variance added at the first level
    beta_end: float = 0.02  # ddpm: variance added at the last level, linear in between
    time_distribution: str = "logit_normal"  # rectified_flow: "logit_normal" or "uniform"
    logit_mean: float = 0.0  # logit_normal: mean of log(t / (1 - t)); above 0 favours noise
    logit_std: float = 1.0  # logit_normal: its standard deviation
    convention: str = "sd3"  # rectified_flow: the network sees 1000 t and answers noise - data (sd3), or 1 - t and
    # data - noise (sit), as the published SiT weights do
    shift: float = 1.0  # rectified_flow: t -> s t / (1 + (s - 1) t), in training and sampling

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"diffusion.objective is {self.objective!r}; choose one of {', '.join(OBJECTIVES)}")
        if self.time_distribution not in TIME_DISTRIBUTIONS:
            raise ValueError(
                f"diffusion.time_distribution is {self.time_distribution!r}; "
                f"choose one of {', '.join(TIME_DISTRIBUTIONS)}"
            )
        if self.convention not in CONVENTIONS:
            raise ValueError(f"diffusion.convention is {self.convention!r}; choose one of {', '.join(CONVENTIONS)}")
        if self.learned_sigma and self.objective != "ddpm" and self.convention != "sit":
            raise ValueError(
                "diffusion.learned_sigma needs diffusion.objective 'ddpm': a flow has no variance to learn"
            )
        if self.timesteps < 2:
            raise ValueError(f"diffusion.timesteps is {self.timesteps}; it must be at least 2")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                f"diffusion.beta_start {self.beta_start} and beta_end {self.beta_end} "
                "must satisfy 0 < beta_start <= beta_end < 1"
            )
        if self.logit_std <= 0.0 or self.shift <= 0.0:
            raise ValueError(f"diffusion.logit_std {self.logit_std} and diffusion.shift {self.shift} must be positive")


class Prediction(NamedTuple):
    """What a network's output says about a noisy input; both parts together give that input back."""

    clean: jax.Array  # [B, ..., C] estimate of x_0
    noise: jax.Array  # [B, ..., C] estimate of the noise
    # [B, ..., C] or None: 1 asks for the largest log-variance of an ancestral transition, 0 for the smallest,
    # and values between (or beyond) interpolate. A fraction, since both ends depend on the chain sampled.
    variance_fraction: jax.Array | None = None


class Objective(Protocol):
    """One contract for every objective. `times` [B] are in the objective's own unit, larger is noisier."""

    name: str  # one of OBJECTIVES

    def output_channels(self, channels: int) -> int:
        """Channels that the network must produce for data of `channels` channels."""

    def sample_times(self, key: jax.Array, count: int) -> jax.Array:
        """Training times, [count] float32."""

    def normalized(self, times: jax.Array) -> jax.Array:
        """[B] in [0, 1]: 0 is clean, 1 is pure noise."""

    def network_times(self, times: jax.Array) -> jax.Array:
        """[B] floats: what the network's timestep embedding sees."""

    def signal_and_sigma(self, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two coefficients, [B] each, of x_t = signal x_0 + sigma noise."""

    def perturb(self, clean: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """x_t = signal x_0 + sigma noise, [B, ..., C]."""

    def loss(self, output, clean, noise, noisy, times) -> jax.Array:
        """[B] per-sample loss of the network's `output` [B, ..., output_channels] at `noisy` [B, ..., C]."""

    def predict(self, output: jax.Array, noisy: jax.Array, times: jax.Array) -> Prediction:
        """The network's output, read as clean data and noise."""

    def time_grid(self, diffusion_steps: int) -> np.ndarray:
        """[diffusion_steps + 1] float64, from pure noise down to clean."""

    # The probability-flow ODE, in the coordinates where the objective makes it simplest:
    # z = x / scale(t) obeys dz/du = direction(prediction) with u = clock(t).

    def scale(self, times: jax.Array) -> jax.Array:
        """[B], never 0."""

    def clock(self, times: jax.Array) -> jax.Array:
        """[B], 0 at clean, growing with noise."""

    def direction(self, prediction: Prediction) -> jax.Array:
        """dz/du, [B, ..., C]."""


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """[B] reshaped to [B, 1, ..., 1], to meet `like` [B, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def at_least_float32(array: jax.Array) -> jax.Array:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _mean_per_sample(array: jax.Array) -> jax.Array:
    return array.mean(axis=tuple(range(1, array.ndim)))  # [B, ...] -> [B]


def _perturb(objective: Objective, clean, noise, times):
    signal, sigma = objective.signal_and_sigma(times)
    return per_sample(signal, clean) * at_least_float32(clean) + per_sample(sigma, noise) * at_least_float32(noise)


def _check_diffusion_steps(diffusion_steps: int, largest: float = math.inf):
    if not 1 <= diffusion_steps <= largest:
        limit = "at least 1" if largest == math.inf else f"between 1 and the {largest} timesteps trained on"
        raise ValueError(f"diffusion_steps is {diffusion_steps}; it must be {limit}")


class RectifiedFlow:
    """Straight paths from data to noise (Liu et al. 2022; SiT and SD3's linear path).

    Times are t in [0, 1], x_t = (1 - t) x_0 + t noise, and the output is the velocity noise - x_0, or as
    `convention` says.
    """

    name = "rectified_flow"

    def __init__(self, config: DiffusionConfig):
        self.config = config

    def _shifted(self, times):
        shift = self.config.shift  # Esser et al. 2024 (SD3), equation 23
        return shift * times / (1.0 + (shift - 1.0) * times)

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.config.learned_sigma else channels

    def _velocity(self, output, channels: int):
        """noise - x_0 [B, ..., C] out of the network's answer."""
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

    def perturb(self, clean, noise, times):
        return _perturb(self, clean, noise, times)

    def loss(self, output, clean, noise, noisy, times):
        velocity = at_least_float32(noise) - at_least_float32(clean)  # [B, ..., C]
        return _mean_per_sample((self._velocity(output, clean.shape[-1]) - velocity) ** 2)  # [B]

    def predict(self, output, noisy, times) -> Prediction:
        velocity, noisy = self._velocity(output, noisy.shape[-1]), at_least_float32(noisy)
        times = per_sample(times, noisy)
        return Prediction(clean=noisy - times * velocity, noise=noisy + (1.0 - times) * velocity)

    def time_grid(self, diffusion_steps: int) -> np.ndarray:
        _check_diffusion_steps(diffusion_steps)
        return self._shifted(np.linspace(1.0, 0.0, diffusion_steps + 1))

    def scale(self, times):
        return jnp.ones_like(times)

    def clock(self, times):
        return times

    def direction(self, prediction: Prediction):
        return prediction.noise - prediction.clean


class DDPM:
    """Noise prediction on linear betas (Ho et al. 2020), with improved DDPM's learned variances if asked.

    Times are levels 0 ... timesteps: level 0 is clean data (alpha_bar = 1), level l is timestep index l - 1,
    and x_l = sqrt(alpha_bar_l) x_0 + sqrt(1 - alpha_bar_l) noise. The output is the noise, followed along the
    channels, with learned_sigma, by v, which names the variance_fraction (v + 1) / 2.
    """

    name = "ddpm"

    def __init__(self, config: DiffusionConfig):
        self.config = config
        betas = np.linspace(config.beta_start, config.beta_end, config.timesteps)  # [T]
        alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])  # [T + 1], by level, as are all tables
        self._signal, self._sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
        self._clock = self._sigma / self._signal
        chain = gaussian.posterior(self._signal[1:], self._sigma[1:], self._signal[:-1], self._sigma[:-1])
        # Level 0 has no transition below it; its entry is never read. Level 1 is left with certainty, so its
        # log-variance is taken from level 2, which keeps the learned range finite there.
        by_level = {field: np.concatenate([[0.0], values]) for field, values in chain._asdict().items()}
        self._clean_weight, self._noisy_weight = by_level["clean_weight"], by_level["noisy_weight"]
        self._log_variance = np.log(chain.variance[np.maximum(np.arange(-1, config.timesteps), 1)])
        self._log_beta = np.log(np.concatenate([betas[:1], betas]))

    def _at(self, table: np.ndarray, times):
        return jnp.asarray(table, times.dtype)[times.astype(jnp.int32)]  # [B]

    def output_channels(self, channels: int) -> int:
        return 2 * channels if self.config.learned_sigma else channels

    def sample_times(self, key, count: int):
        return jax.random.randint(key, (count,), 1, self.config.timesteps + 1).astype(jnp.float32)

    def normalized(self, times):
        return times / self.config.timesteps

    def network_times(self, times):
        return times - 1.0

    def signal_and_sigma(self, times):
        return self._at(self._signal, times), self._at(self._sigma, times)

    def perturb(self, clean, noise, times):
        return _perturb(self, clean, noise, times)

    def loss(self, output, clean, noise, noisy, times):
        """Mean squared error of the noise; with learned_sigma plus the variational bound, which trains the
        variance alone (L_hybrid of Nichol and Dhariwal 2021, with DiT's weight of 1)."""
        prediction = self.predict(output, noisy, times)
        error = _mean_per_sample((prediction.noise - at_least_float32(noise)) ** 2)  # [B]
        if not self.config.learned_sigma:
            return error
        frozen = jax.tree.map(jax.lax.stop_gradient, prediction)
        frozen = frozen._replace(variance_fraction=prediction.variance_fraction)
        return error + self.variational_bound(frozen, clean, noisy, times)  # [B]

    def variational_bound(self, prediction: Prediction, clean, noisy, times):
        """The bound's term at each sample's level, [B], in bits per dimension.

        KL from the true to the predicted transition; at level 1 the data's discretized likelihood instead."""
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
        surprise = -gaussian.discretized_log_likelihood(clean, mean, log_variance)
        nats = jnp.where(times == 1, _mean_per_sample(surprise), _mean_per_sample(divergence))
        return nats / math.log(2.0)

    def predict(self, output, noisy, times) -> Prediction:
        output, noisy = at_least_float32(output), at_least_float32(noisy)
        channels = noisy.shape[-1]
        if output.shape[-1] != self.output_channels(channels):
            raise ValueError(
                f"the network gave {output.shape[-1]} channels for data of {channels}; "
                f"this objective needs {self.output_channels(channels)}"
            )
        noise = output[..., :channels]
        fraction = (output[..., channels:] + 1.0) / 2.0 if self.config.learned_sigma else None
        signal, sigma = (per_sample(values, noisy) for values in self.signal_and_sigma(times))
        return Prediction(clean=(noisy - sigma * noise) / signal, noise=noise, variance_fraction=fraction)

    def time_grid(self, diffusion_steps: int) -> np.ndarray:
        """Improved DDPM's respacing: timestep indices 0, k, 2k, ... T - 1 of fractional stride k, rounded.

        A single diffusion step leaves from the noisiest level."""
        timesteps = self.config.timesteps
        _check_diffusion_steps(diffusion_steps, timesteps)
        if diffusion_steps == 1:
            return np.array([timesteps, 0.0])
        strides = np.full(diffusion_steps - 1, (timesteps - 1) / (diffusion_steps - 1))
        # Summed, not multiplied: what lands on a half then rounds to the same side as in the published code.
        indices = np.round(np.concatenate([[0.0], np.cumsum(strides)]))  # [n]
        return np.concatenate([indices[::-1] + 1.0, [0.0]])  # [n + 1] levels

    def scale(self, times):
        return self._at(self._signal, times)

    def clock(self, times):
        return self._at(self._clock, times)

    def direction(self, prediction: Prediction):
        return prediction.noise


def make_objective(config: DiffusionConfig) -> Objective:
    """The objective that `config` names."""
    return {"ddpm": DDPM, "rectified_flow": RectifiedFlow}[config.objective](config)
