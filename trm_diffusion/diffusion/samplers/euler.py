"""Euler's method on the probability-flow ODE."""

from trm_diffusion.diffusion.objective import per_sample
from trm_diffusion.diffusion.samplers.base import SingleEvaluationSampler


class Euler(SingleEvaluationSampler):
    """Euler's method on dz/du = direction, with z = x / scale and u = clock (see `Objective`)."""

    def update(self, noisy, prediction, times, next_times, draw_noise):
        objective = self.objective
        scale, next_scale = (per_sample(objective.scale(at), noisy) for at in (times, next_times))
        duration = per_sample(objective.clock(next_times) - objective.clock(times), noisy)
        return next_scale * (noisy / scale + duration * objective.direction(prediction))
