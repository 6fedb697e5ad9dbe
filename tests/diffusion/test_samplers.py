"""Samplers on data N(MEAN, diag(DEVIATION^2)), for which the optimal network and the exact result are known.

A sampler is then an affine map of its noises, so moments can be propagated through it exactly.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_diffusion.diffusion import samplers
from trm_diffusion.diffusion.objective import DiffusionConfig, per_sample
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.diffusion.samplers import draw_initial_noise, sample, sampler_class
from trm_diffusion.diffusion.samplers.base import SingleEvaluationSampler

MEAN = np.array([[0.5, -1.0, 0.2]])  # [1, D]
DEVIATION = np.array([[0.3, 1.5, 0.8]])  # [1, D]
DIMENSIONS = MEAN.shape[-1]
FLOW = make_objective(DiffusionConfig())
# Level 1 is at clock 1e-3, so the step from it to clean, which no grid refines, has a small error.
FINE_DDPM = make_objective(DiffusionConfig(objective="ddpm", beta_start=1e-6))
DDPM = make_objective(DiffusionConfig(objective="ddpm"))
HYBRID = make_objective(DiffusionConfig(objective="ddpm", learned_sigma=True))
ANCESTRAL = sampler_class("ddpm")(HYBRID, jnp.asarray(HYBRID.time_grid(2)))
EVERY_PAIR = [(DDPM, name) for name in samplers.SAMPLERS] + [(FLOW, name) for name in ("ddim", "euler", "heun", "ab2")]
KEYS = jax.random.split(jax.random.key(0), 4)


def name_of(value):
    return getattr(value, "name", value)


def marginal(objective, times):
    """(mean [B, D], deviation [B, D]) of x_t."""
    signal, sigma = (per_sample(jnp.atleast_1d(values), MEAN) for values in objective.signal_and_sigma(times))
    return signal * MEAN, jnp.sqrt(signal**2 * DEVIATION**2 + sigma**2)


def exact_network(objective, aux=None):
    """The network that minimizes the expected loss on this data."""

    def network(noisy, times):
        signal, sigma = (per_sample(values, noisy) for values in objective.signal_and_sigma(times))
        centred = (noisy - signal * MEAN) / (signal**2 * DEVIATION**2 + sigma**2)
        clean, noise = MEAN + signal * DEVIATION**2 * centred, sigma * centred
        output = noise if objective.name == "ddpm" else noise - clean
        missing = objective.output_channels(DIMENSIONS) - DIMENSIONS
        output = jnp.concatenate([output, jnp.full((len(noisy), missing), -1.0)], axis=-1)
        return output.astype(noisy.dtype), None if aux is None else aux(times)

    return network


def affine_map(objective, sampler, diffusion_steps):
    """(offset [1, D], matrix [D, D]) of a deterministic sampler: sample = offset + initial_noise @ matrix."""
    basis = jnp.concatenate([jnp.zeros((1, DIMENSIONS)), jnp.eye(DIMENSIONS)])
    run = jax.jit(
        functools.partial(sample, exact_network(objective), objective, sampler=sampler, diffusion_steps=diffusion_steps)
    )
    reached, _ = run(basis, KEYS)
    return reached[:1], reached[1:] - reached[:1]


def observed_orders(errors, counts):
    return np.log(np.divide(errors[:-1], errors[1:])) / np.log(np.divide(counts[1:], counts[:-1]))


@pytest.mark.parametrize(
    "sampler, order, largest_error", [("euler", 1, 0.05), ("ddim", 1, 0.05), ("heun", 2, 5e-4), ("ab2", 2, 5e-4)]
)
@pytest.mark.parametrize("objective, strides", [(FLOW, (20, 40, 80)), (FINE_DDPM, (37, 111, 333))], ids=name_of)
def test_moments_and_order_of_the_probability_flow(sampler, order, largest_error, objective, strides, float64):
    """The exact flow keeps quantiles. DDPM's strides divide its 999 intervals, so nothing is rounded."""
    start = jnp.asarray(objective.time_grid(1)[:1])
    start_mean, start_deviation = marginal(objective, start)
    point = start_mean + start_deviation * 1.7
    exact = MEAN + 1.7 * DEVIATION
    errors = []
    for stride_count in strides:
        diffusion_steps = stride_count + (objective.name == "ddpm")
        offset, matrix = affine_map(objective, sampler, diffusion_steps)
        mean = offset + start_mean @ matrix
        covariance = matrix.T @ jnp.diag(start_deviation[0] ** 2) @ matrix
        errors.append(float(jnp.abs(offset + point @ matrix - exact).max()))
    assert errors[-1] < largest_error
    chex.assert_trees_all_close(mean, MEAN, atol=largest_error)
    chex.assert_trees_all_close(covariance, np.diag(DEVIATION[0] ** 2), atol=2 * largest_error)
    np.testing.assert_allclose(observed_orders(errors, strides), order, atol=0.15)


def propagated_moments(objective, name, diffusion_steps, eta=0.0):
    """Mean and variance [1, D] after a sampler has run over the grid, from the exact marginal at pure noise.

    One diffusion step is x' = offset + gain x + spread noise; its three numbers are read off three inputs."""
    network, grid = exact_network(objective), jnp.asarray(objective.time_grid(diffusion_steps))
    sampler = sampler_class(name)(objective, grid, eta)

    def diffusion_step(moments, ends):
        mean, variance = moments
        noisy = jnp.concatenate([mean, mean + 1.0, mean])  # [3, D]
        noise = jnp.concatenate([jnp.zeros((2, DIMENSIONS)), jnp.ones((1, DIMENSIONS))])
        _, times = sampler.evaluation_point(noisy, ends)
        prediction = objective.predict(network(noisy, times)[0], noisy, times)
        moved = sampler.step(noisy, ends, prediction, lambda: noise)
        gain, spread = moved[1:2] - moved[:1], moved[2:] - moved[:1]
        return (moved[:1], gain**2 * variance + spread**2), None

    mean, deviation = marginal(objective, grid[:1])
    return jax.lax.scan(diffusion_step, (mean, deviation**2), sampler.evaluations())[0]


@pytest.mark.parametrize("objective", [DDPM, HYBRID], ids=["fixed", "learned"])
def test_ancestral_sampling_is_of_order_1_in_variance_and_exact_in_mean(objective, float64):
    strides, errors = (111, 333, 999), []
    for stride_count in strides:
        mean, variance = propagated_moments(objective, "ddpm", stride_count + 1)
        chex.assert_trees_all_close(mean, MEAN, atol=1e-10)
        errors.append(float(jnp.abs(variance - DEVIATION**2).max()))
    assert errors[-1] < 0.02
    np.testing.assert_allclose(observed_orders(errors, strides), 1.0, atol=0.1)


@pytest.mark.parametrize(
    "objective, sampler, eta",
    [
        (DDPM, "ddpm", 0.0),
        (HYBRID, "ddpm", 0.0),
        (DDPM, "ddim", 0.6),
        (FLOW, "ddim", 0.6),
        (FLOW, "ddim", 1.0),
    ],
    ids=name_of,
)
def test_many_samples_have_the_propagated_moments(objective, sampler, eta):
    """The whole sampler: its noise has unit variance and is independent across dimensions and diffusion steps."""
    count, diffusion_steps = 20_000, 12
    keys = jax.random.split(jax.random.key(7), count)
    start = jnp.asarray(objective.time_grid(1)[:1], jnp.float32)
    start_mean, start_deviation = marginal(objective, start)
    noise = start_mean + start_deviation * draw_initial_noise(keys, (DIMENSIONS,))
    run = jax.jit(
        functools.partial(
            sample,
            exact_network(objective),
            objective,
            sampler=sampler,
            diffusion_steps=diffusion_steps,
            eta=eta,
        )
    )
    samples = np.asarray(run(noise, keys)[0], np.float64)
    mean, variance = map(np.asarray, propagated_moments(objective, sampler, diffusion_steps, eta))
    five_sigma = 5 / np.sqrt(count)
    standard = (samples - mean) / np.sqrt(variance)
    np.testing.assert_allclose(standard.mean(0), 0.0, atol=five_sigma)
    covariance = standard.T @ standard / count
    np.testing.assert_allclose(np.diag(covariance), 1.0, atol=np.sqrt(2) * five_sigma)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0.0, atol=five_sigma)


@pytest.mark.parametrize("fraction, expected", [(0.0, "posterior"), (1.0, "beta"), (0.5, "between")])
def test_learned_variance_spans_the_respaced_chain(fraction, expected):
    """From level 801 to 401 the range is that of this transition, not that of one of the 1000."""
    times, next_times = jnp.array([801.0]), jnp.array([401.0])
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[[800, 400]]
    beta = 1.0 - alpha_bar[0] / alpha_bar[1]
    posterior = beta * (1.0 - alpha_bar[1]) / (1.0 - alpha_bar[0])
    variance = {"posterior": posterior, "beta": beta, "between": np.sqrt(beta * posterior)}[expected]
    noisy = jnp.ones((1, 3))
    prediction = HYBRID.predict(jnp.full((1, 6), 2.0 * fraction - 1.0), noisy, times)
    moved, still = (
        ANCESTRAL.update(noisy, prediction, times, next_times, lambda z=z: z)
        for z in (jnp.ones((1, 3)), jnp.zeros((1, 3)))
    )
    np.testing.assert_allclose((moved - still) ** 2, variance, rtol=1e-4)


@pytest.mark.parametrize("fraction", [-0.2, 0.0, 1.0])
def test_last_transition_lands_on_the_predicted_data(fraction):
    times, next_times, noisy = jnp.array([1.0]), jnp.array([0.0]), jnp.full((1, 3), 0.3)
    output = jnp.concatenate([jnp.full((1, 3), 0.5), jnp.full((1, 3), 2.0 * fraction - 1.0)], -1)
    prediction = HYBRID.predict(output, noisy, times)
    moved = ANCESTRAL.update(noisy, prediction, times, next_times, lambda: jnp.full((1, 3), 9.0))
    chex.assert_trees_all_close(moved, prediction.clean, rtol=1e-6)


class IdentityTest(chex.TestCase):
    """Samplers that are algebraically the same, jitted or not."""

    def run_sampler(self, objective, **options):
        noise = draw_initial_noise(KEYS, (DIMENSIONS,))
        network = exact_network(objective)
        run = self.variant(lambda noise, keys: sample(network, objective, noise, keys, **options)[0])
        return run(noise, KEYS)

    @chex.variants(with_jit=True, without_jit=True)
    def test_euler_is_ddim_without_noise(self):
        for objective in (FLOW, DDPM):
            euler = self.run_sampler(objective, sampler="euler", diffusion_steps=13)
            chex.assert_trees_all_close(
                euler, self.run_sampler(objective, sampler="ddim", diffusion_steps=13), atol=2e-5
            )

    @chex.variants(with_jit=True, without_jit=True)
    def test_ancestral_is_ddim_with_all_its_noise(self):
        ancestral = self.run_sampler(DDPM, sampler="ddpm", diffusion_steps=13)
        chex.assert_trees_all_close(
            ancestral, self.run_sampler(DDPM, sampler="ddim", diffusion_steps=13, eta=1.0), atol=2e-5
        )
        quiet = self.run_sampler(DDPM, sampler="ddim", diffusion_steps=13)
        assert jnp.abs(ancestral - quiet).max() > 0.1

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_step_of_a_second_order_sampler_is_euler(self):
        for objective in (FLOW, DDPM):
            names = ("heun", "ab2", "euler")
            *second, euler = (self.run_sampler(objective, sampler=name, diffusion_steps=1) for name in names)
            for samples in second:
                # DDPM starts at z = 157 x and ends at z = x: float32 leaves 157 times its usual rounding.
                chex.assert_trees_all_close(samples, euler, atol=1e-4)


@pytest.mark.parametrize("objective, sampler", EVERY_PAIR, ids=name_of)
def test_a_sample_does_not_depend_on_its_batch(objective, sampler):
    keys = jax.random.split(jax.random.key(3), 7)

    @jax.jit
    def run(keys):
        return sample(
            exact_network(objective),
            objective,
            draw_initial_noise(keys, (DIMENSIONS,)),
            keys,
            sampler=sampler,
            diffusion_steps=6,
            eta=0.5 if sampler == "ddim" else 0.0,
        )[0]

    together = run(keys)
    order = np.array([4, 0, 6])
    chex.assert_trees_all_close(run(keys[order]), together[order], rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.asarray(together[:, 0]))) == 7


def test_every_diffusion_step_and_the_start_draw_different_noise():
    class OnlyNoise(SingleEvaluationSampler):
        def update(self, noisy, prediction, times, next_times, draw_noise):
            return draw_noise()

    drawn = []
    for diffusion_steps in (1, 2, 3):  # the state after the last step is the noise of that step
        grid = jnp.asarray(FLOW.time_grid(diffusion_steps), jnp.float32)
        noise = draw_initial_noise(KEYS, (DIMENSIONS,))
        last, _ = samplers.run(OnlyNoise(FLOW, grid), exact_network(FLOW), noise, KEYS)
        drawn.append(last)
    values = np.concatenate([np.ravel(array) for array in (noise, *drawn)])
    assert len(np.unique(values)) == values.size == 4 * KEYS.size * DIMENSIONS


@pytest.mark.parametrize("objective, sampler", EVERY_PAIR, ids=name_of)
def test_the_network_is_traced_once(objective, sampler):
    noise = draw_initial_noise(KEYS, (DIMENSIONS,))
    for diffusion_steps in (3, 9):
        traces = []

        def network(noisy, times, traces=traces):
            traces.append(noisy.shape)
            return exact_network(objective)(noisy, times)

        run = functools.partial(sample, network, objective, sampler=sampler, diffusion_steps=diffusion_steps)
        jax.eval_shape(run, noise, KEYS)
        assert traces == [noise.shape]


@pytest.mark.parametrize("objective, sampler", EVERY_PAIR, ids=name_of)
def test_aux_is_stacked_over_diffusion_steps(objective, sampler):
    network = exact_network(objective, aux=lambda times: {"times": times, "total": times.sum()})
    noise = draw_initial_noise(KEYS, (DIMENSIONS,))
    samples, aux = sample(network, objective, noise, KEYS, sampler=sampler, diffusion_steps=5)
    assert samples.shape == noise.shape
    starts = jnp.asarray(objective.time_grid(5)[:-1], jnp.float32)
    expected = {"times": jnp.tile(starts[:, None], (1, 4)), "total": 4 * starts}
    chex.assert_trees_all_close(aux, expected, rtol=1e-6)


@pytest.mark.parametrize("objective, sampler", EVERY_PAIR, ids=name_of)
def test_networks_are_only_asked_where_they_are_trained(objective, sampler):
    """No evaluation on clean data: level 0 of DDPM has no timestep index."""
    times_seen = []

    def network(noisy, times):
        jax.debug.callback(lambda t: times_seen.append(float(t)), times[0])
        return exact_network(objective)(noisy, times)

    noise = draw_initial_noise(KEYS, (DIMENSIONS,))
    jax.block_until_ready(sample(network, objective, noise, KEYS, sampler=sampler, diffusion_steps=4)[0])
    jax.effects_barrier()
    assert len(times_seen) == (7 if sampler == "heun" else 4) and min(times_seen) > 0.0


def test_a_bfloat16_network_still_gives_float32_samples():
    def network(noisy, times):
        return exact_network(FLOW)(noisy, times)[0].astype(jnp.bfloat16), None

    noise = draw_initial_noise(KEYS, (DIMENSIONS,), jnp.bfloat16)
    samples, aux = sample(network, FLOW, noise, KEYS, sampler="heun", diffusion_steps=3)
    assert noise.dtype == jnp.bfloat16 and samples.dtype == jnp.float32 and aux is None


def test_initial_noise_is_standard_normal():
    noise = draw_initial_noise(jax.random.split(jax.random.key(5), 5_000), (2, 2))
    assert noise.shape == (5_000, 2, 2) and noise.dtype == jnp.float32
    np.testing.assert_allclose(noise.mean(), 0.0, atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(noise.var(), 1.0, atol=5 * np.sqrt(2 / 20_000))


@pytest.mark.parametrize(
    "sampler, objective_name, word",
    [("ddpm", "rectified_flow", "ddim, euler, heun or ab2"), ("dopri5", "ddpm", "dopri5")],
)
def test_check_sampler_refuses_in_one_line(sampler, objective_name, word):
    with pytest.raises(ValueError, match=word) as refusal:
        samplers.check_sampler(sampler, objective_name)
    assert "\n" not in str(refusal.value)


def test_check_sampler_accepts_every_supported_pair():
    for objective, sampler in EVERY_PAIR:
        samplers.check_sampler(sampler, objective.name)


@pytest.mark.parametrize(
    "options", [{"sampler": "ddpm"}, {"sampler": "euler", "eta": 0.5}, {"sampler": "ddim", "eta": 1.5}]
)
def test_sample_refuses_what_it_would_ignore(options):
    with pytest.raises(ValueError, match="sampler|eta"):
        sample(exact_network(FLOW), FLOW, jnp.zeros((4, DIMENSIONS)), KEYS, diffusion_steps=2, **options)
