"""The two-step Adams-Bashforth method on the probability-flow ODE: second order, one network evaluation per step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trm_diffusion.diffusion.samplers.base import Sampler


class AB2Carry(NamedTuple):
    z: jax.Array  # [B, ..., C]
    direction: jax.Array  # [B, ..., C], of the previous diffusion step


class AB2Evaluation(NamedTuple):
    """Leaves [n]."""

    time: jax.Array
    scale: jax.Array
    move: jax.Array  # h_i
    weight: jax.Array  # h_i / (2 h_{i-1}); 0 in the first diffusion step, which is then an Euler step


class AB2(Sampler):
    """An Euler step on dz/du = direction, with the slope extrapolated to the middle of the step:

        z_{i+1} = z_i + h_i (d_i + h_i / (2 h_{i-1}) (d_i - d_{i-1})),    h_i = u_{i+1} - u_i

    DPM-Solver++(2M) (Lu et al. 2022) is closely related: it extrapolates the data prediction in log(signal / sigma),
    which is infinite at both ends of a flow.
    """

    def init(self, noise):
        return AB2Carry(noise / self._scale[0], jnp.zeros_like(noise))

    def evaluations(self):
        moves = jnp.diff(self.objective.clock(self.grid))  # [n]
        weight = jnp.concatenate([jnp.zeros((1,), self.grid.dtype), 0.5 * moves[1:] / moves[:-1]])
        return AB2Evaluation(self.grid[:-1], self._scale[:-1], moves, weight)

    def evaluation_point(self, carry, row):
        return row.scale * carry.z, jnp.full((len(carry.z),), row.time)

    def step(self, carry, row, prediction, draw_noise):
        direction = self.objective.direction(prediction)
        z = carry.z + row.move * (direction + row.weight * (direction - carry.direction))
        return AB2Carry(z, direction)

    def result(self, carry):
        return self._scale[-1] * carry.z

    @property
    def _scale(self):
        return self.objective.scale(self.grid)  # [n + 1]
