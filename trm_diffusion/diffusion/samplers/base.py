"""The interface of samplers: where to evaluate the network, and how to step from the prediction there."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trm_diffusion.diffusion.objective import OBJECTIVES, Objective, Prediction

DrawNoise = Callable[[], jax.Array]  # standard normal noise [B, ..., C], fresh in every network evaluation


class Sampler(abc.ABC):
    """Steps from pure noise to data along a grid of times, as a scan over network evaluations.

    `sample` runs it: carry = init(noise); then, for each row of evaluations(), the network is evaluated at
    evaluation_point(carry, row) and carry = step(carry, row, prediction, draw_noise); finally result(carry). A carry is
    any pytree whose shapes and dtypes do not change. Samples of a batch must not affect each other.

    Attributes:
      objectives: names of the supported objectives.
      takes_eta: whether eta, the share of fresh noise, may differ from 0.
      evaluations_per_step: network evaluations per diffusion step; the last diffusion step may have fewer. Only the aux
        of each diffusion step's first evaluation is kept.
    """

    objectives: tuple[str, ...] = OBJECTIVES
    takes_eta = False
    evaluations_per_step = 1

    def __init__(self, objective: Objective, grid: jax.Array, eta: float = 0.0):
        """grid: [n + 1] times from pure noise to clean, for n diffusion steps; eta: a Python number in [0, 1]."""
        self.objective, self.grid, self.eta = objective, grid, eta

    @abc.abstractmethod
    def init(self, noise: jax.Array) -> Any:
        """The initial carry, from pure noise [B, ..., C]."""

    @abc.abstractmethod
    def evaluations(self) -> Any:
        """What each network evaluation needs from the grid: a pytree with leaves [evaluations, ...]."""

    @abc.abstractmethod
    def evaluation_point(self, carry: Any, row: Any) -> tuple[jax.Array, jax.Array]:
        """(x_t [B, ..., C], times [B]) at which the network is evaluated."""

    @abc.abstractmethod
    def step(self, carry: Any, row: Any, prediction: Prediction, draw_noise: DrawNoise) -> Any:
        """The next carry, given the prediction at `evaluation_point`."""

    @abc.abstractmethod
    def result(self, carry: Any) -> jax.Array:
        """The samples [B, ..., C], from the last carry."""


class SingleEvaluationSampler(Sampler):
    """A sampler that carries only x_t and evaluates the network once per diffusion step; subclasses define `update`."""

    @abc.abstractmethod
    def update(
        self,
        noisy: jax.Array,
        prediction: Prediction,
        times: jax.Array,
        next_times: jax.Array,
        draw_noise: DrawNoise,
    ) -> jax.Array:
        """x at next_times [B], from x = noisy [B, ..., C] at times [B] and the prediction there."""

    def init(self, noise):
        return noise

    def evaluations(self):
        return self.grid[:-1], self.grid[1:]  # [n] each

    def evaluation_point(self, noisy, row):
        time, _ = row
        return noisy, jnp.full((len(noisy),), time)

    def step(self, noisy, row, prediction, draw_noise):
        times, next_times = (jnp.full((len(noisy),), time) for time in row)  # [B] each
        return self.update(noisy, prediction, times, next_times, draw_noise)

    def result(self, noisy):
        return noisy
