"""Heun's method on the probability-flow ODE: second order, two network evaluations per diffusion step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trm_diffusion.diffusion.objective import per_sample
from trm_diffusion.diffusion.samplers.base import Sampler


class HeunCarry(NamedTuple):
    """Positions and slope of z = x / scale, [B, ..., C]."""

    begin: jax.Array  # where the diffusion step began
    point: jax.Array  # where the network is evaluated next
    slope: jax.Array  # at `begin`, if the corrector is next


class HeunEvaluation(NamedTuple):
    """Leaves [2n - 1]: alternating predictor and corrector; the last diffusion step has no corrector."""

    time: jax.Array  # of the evaluation
    start: jax.Array  # of its diffusion step
    end: jax.Array
    is_corrector: jax.Array


class Heun(Sampler):
    """Heun's method on dz/du: an Euler step, then the same step with the mean of the slopes at its two ends.

    The last diffusion step is a plain Euler step, as in algorithm 1 of Karras et al. 2022: its second slope would be
    taken on clean data, where no network is trained. One Euler step among n keeps the order at 2. Scanning over the
    2n - 1 evaluations, not over diffusion steps, wastes none and traces the network once.
    """

    evaluations_per_step = 2

    def init(self, noise):
        begin = noise / self.objective.scale(self.grid[:1])[0]
        return HeunCarry(begin, begin, jnp.zeros_like(begin))

    def evaluations(self):
        order = jnp.arange(2 * len(self.grid) - 3)
        step = order // 2
        return HeunEvaluation(self.grid[(order + 1) // 2], self.grid[step], self.grid[step + 1], order % 2 == 1)

    def evaluation_point(self, carry, row):
        times = jnp.full((len(carry.point),), row.time)
        return per_sample(self.objective.scale(times), carry.point) * carry.point, times

    def step(self, carry, row, prediction, draw_noise):
        direction = self.objective.direction(prediction)
        duration = jnp.diff(self.objective.clock(jnp.stack([row.start, row.end])))[0]
        slope = jnp.where(row.is_corrector, 0.5 * (carry.slope + direction), direction)
        point = carry.begin + duration * slope
        return HeunCarry(jnp.where(row.is_corrector, point, carry.begin), point, slope)

    def result(self, carry):
        return self.objective.scale(self.grid[-1:])[0] * carry.point
