"""Samplers: from noise to data with any network and any objective, one `jax.lax.scan` each.

A network is network(noisy [B, ..., C], times [B] in the objective's unit) -> (output, aux); it is traced
once, however many diffusion steps there are. A sample depends on its own noise and key, never on its batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trm_diffusion.diffusion import gaussian
from trm_diffusion.diffusion.objective import Objective, Prediction, per_sample

SAMPLERS = ("ddpm", "ddim", "euler", "heun", "ab2")


def check_sampler(sampler: str, objective_name: str, eta: float = 0.0):
    """Raise ValueError, in one line, for an unknown sampler, or one that cannot use the objective or eta."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if sampler == "ddpm" and objective_name != "ddpm":
        raise ValueError(
            f"sampler 'ddpm' walks a chain of betas, which objective {objective_name!r} lacks; "
            "choose ddim, euler, heun or ab2"
        )
    if not 0.0 <= eta <= 1.0 or (eta != 0.0 and sampler != "ddim"):
        raise ValueError(f"eta is {eta} with sampler {sampler!r}; it belongs to ddim, between 0 and 1")


def _normal(keys: jax.Array, fold: int | jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal noise [B, *shape], row b from keys[b] alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, fold), shape, dtype))(keys)


def draw_initial_noise(keys: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Pure noise [B, *shape] for keys [B]; `shape` is one sample's."""
    return _normal(keys, 0, shape, dtype)  # diffusion step i folds in i + 1


def ancestral_update(objective: Objective, noisy, prediction: Prediction, times, next_times, draw_noise):
    """A draw from p(x_s | x_t), DDPM's reverse transition on the chain that is sampled.

    Its mean is the posterior's at the predicted data. Its variance is the posterior's (the smaller of Ho et
    al.'s two) or, if predicted, interpolates in log between that and this chain's beta. The transition to
    clean data adds no noise.
    """
    signal, sigma, next_signal, next_sigma = (
        per_sample(values, noisy)
        for values in (*objective.signal_and_sigma(times), *objective.signal_and_sigma(next_times))
    )
    transition = gaussian.posterior(signal, sigma, next_signal, next_sigma)
    mean = transition.clean_weight * prediction.clean + transition.noisy_weight * noisy
    is_last = next_sigma == 0.0
    log_beta = jnp.log(transition.forward_variance)
    log_variance = jnp.where(is_last, log_beta, jnp.log(jnp.where(is_last, 1.0, transition.variance)))
    if prediction.variance_fraction is not None:
        log_variance = log_variance + prediction.variance_fraction * (log_beta - log_variance)
    return mean + jnp.where(is_last, 0.0, jnp.exp(0.5 * log_variance)) * draw_noise()


def ddim_update(objective: Objective, noisy, prediction: Prediction, times, next_times, draw_noise, *, eta):
    """x_s = signal_s x_0 + sqrt(sigma_s^2 - eta^2 v) noise + eta sqrt(v) fresh noise; v: posterior variance.

    Song et al. 2020 (DDIM), equations 12 and 16. eta is a Python number: 0 is deterministic and draws
    nothing, 1 is ddpm with its fixed variance.
    """
    if eta == 0.0:
        return objective.perturb(prediction.clean, prediction.noise, next_times)
    signal, sigma, next_signal, next_sigma = (
        per_sample(values, noisy)
        for values in (*objective.signal_and_sigma(times), *objective.signal_and_sigma(next_times))
    )
    variance = eta**2 * gaussian.posterior(signal, sigma, next_signal, next_sigma).variance
    kept = jnp.sqrt(jnp.maximum(next_sigma**2 - variance, 0.0))  # rounding may leave -1e-9 for 0
    return next_signal * prediction.clean + kept * prediction.noise + jnp.sqrt(variance) * draw_noise()


def euler_update(objective: Objective, noisy, prediction: Prediction, times, next_times, draw_noise):
    """Euler's method on dz/du = direction, with z = x / scale and u = clock. Draws nothing."""
    scale, next_scale = (per_sample(objective.scale(at), noisy) for at in (times, next_times))
    duration = per_sample(objective.clock(next_times) - objective.clock(times), noisy)
    return next_scale * (noisy / scale + duration * objective.direction(prediction))


def _one_evaluation_per_step(network, objective, update, noise, grid, keys):
    """Scan `update` over the grid [n + 1]: (samples [B, ..., C], aux [n, ...])."""
    batch, *shape = noise.shape

    def diffusion_step(noisy, inputs):
        index, time, next_time = inputs
        times, next_times = jnp.full((batch,), time), jnp.full((batch,), next_time)  # [B]
        output, aux = network(noisy, times)
        prediction = objective.predict(output, noisy, times)
        draw_noise = functools.partial(_normal, keys, index + 1, tuple(shape), noisy.dtype)
        return update(objective, noisy, prediction, times, next_times, draw_noise), aux

    indices = jnp.arange(len(grid) - 1)
    return jax.lax.scan(diffusion_step, noise, (indices, grid[:-1], grid[1:]))


def _heun(network, objective, noise, grid):
    """Heun's method on dz/du: Euler's point, then the same move with the mean of the slopes at its two ends.

    The last diffusion step stays Euler, as in algorithm 1 of Karras et al. 2022: its second slope would be
    taken on clean data, where no network is trained. One among n keeps the order at 2. The scan runs over the
    2n - 1 network evaluations, predictor and corrector in turn, so that none is wasted and the network is
    traced once; aux [n, ...] is the predictors'.
    """
    batch = len(noise)

    def evaluation(carry, inputs):
        begin, point, slope = carry  # z where the diffusion step begins; z to evaluate at; slope
        time, start, end, is_corrector = inputs
        times = jnp.full((batch,), time)
        noisy = per_sample(objective.scale(times), point) * point
        output, aux = network(noisy, times)
        direction = objective.direction(objective.predict(output, noisy, times))
        ends = jnp.stack([start, end])
        duration = jnp.diff(objective.clock(ends))[0]
        slope = jnp.where(is_corrector, 0.5 * (slope + direction), direction)
        point = begin + duration * slope
        return (jnp.where(is_corrector, point, begin), point, slope), aux

    order = jnp.arange(2 * len(grid) - 3)  # 2n - 1 evaluations
    inputs = (grid[(order + 1) // 2], grid[order // 2], grid[order // 2 + 1], order % 2 == 1)
    begin = noise / objective.scale(grid[:1])[0]
    (_, point, _), aux = jax.lax.scan(evaluation, (begin, begin, jnp.zeros_like(begin)), inputs)
    return objective.scale(grid[-1:])[0] * point, jax.tree.map(lambda leaf: leaf[::2], aux)


def _ab2(network, objective, noise, grid):
    """Adams and Bashforth's two-step method on dz/du: Euler's move along the slope extrapolated to its middle.

        z_{i+1} = z_i + h_i (d_i + h_i / (2 h_{i-1}) (d_i - d_{i-1})),    h_i = u_{i+1} - u_i

    Second order at one evaluation a diffusion step, the first being Euler's. DPM-Solver++(2M) (Lu et al. 2022) is its
    kin, with the data prediction extrapolated in log(signal / sigma); that is infinite at both ends of a flow.
    """
    batch = len(noise)
    scale, moves = objective.scale(grid), jnp.diff(objective.clock(grid))  # [n + 1], [n]
    weight = jnp.concatenate([jnp.zeros((1,), grid.dtype), 0.5 * moves[1:] / moves[:-1]])

    def diffusion_step(carry, inputs):
        z, direction_before = carry
        time, scale, move, weight = inputs
        times, noisy = jnp.full((batch,), time), scale * z
        output, aux = network(noisy, times)
        direction = objective.direction(objective.predict(output, noisy, times))
        return (z + move * (direction + weight * (direction - direction_before)), direction), aux

    start = (noise / scale[0], jnp.zeros_like(noise))
    (z, _), aux = jax.lax.scan(diffusion_step, start, (grid[:-1], scale[:-1], moves, weight))
    return scale[-1] * z, aux


def sample(
    network: Callable,
    objective: Objective,
    initial_noise: jax.Array,
    keys: jax.Array,
    *,
    sampler: str,
    diffusion_steps: int,
    eta: float = 0.0,
) -> tuple[jax.Array, Any]:
    """Samples from pure noise: (samples [B, ..., C], aux with a leading axis [diffusion_steps]).

    initial_noise [B, ..., C] from `draw_initial_noise`; keys [B], one PRNG key a sample, read by ddpm and by
    ddim with eta > 0. The state is float32, or float64 for float64 noise. To jit, close over all but arrays.
    """
    check_sampler(sampler, objective.name, eta)
    dtype = jnp.promote_types(initial_noise.dtype, jnp.float32)
    noise = initial_noise.astype(dtype)
    grid = jnp.asarray(objective.time_grid(diffusion_steps), dtype)  # [n + 1]
    if sampler == "heun":
        return _heun(network, objective, noise, grid)
    if sampler == "ab2":
        return _ab2(network, objective, noise, grid)
    update = {
        "ddpm": ancestral_update,
        "ddim": functools.partial(ddim_update, eta=eta),
        "euler": euler_update,
    }[sampler]
    return _one_evaluation_per_step(network, objective, update, noise, grid, keys)
