import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from trm_diffusion.diffusion.objective import DiffusionConfig
from trm_diffusion.diffusion.objectives import make_objective

FLOW = DiffusionConfig(objective="rectified_flow")
DDPM = DiffusionConfig(objective="ddpm")
HYBRID = DiffusionConfig(objective="ddpm", learned_sigma=True)
SHAPE = (6, 4, 4, 3)  # [B, H, W, C]
TIMES = {"rectified_flow": [1.0, 0.8, 0.5, 0.3, 0.1, 0.01], "ddpm": [1000.0, 700.0, 500.0, 100.0, 2.0, 1.0]}


def example(config, seed=0):
    """(objective, clean, noise, times, noisy): one sample at each of TIMES."""
    objective = make_objective(config)
    clean, noise = np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)
    times = jnp.asarray(TIMES[config.objective], jnp.float32)
    clean, noise = jnp.asarray(np.tanh(clean)), jnp.asarray(noise)
    return objective, clean, noise, times, objective.perturb(clean, noise, times)


def perfect_output(objective, clean, noise):
    """The output of a perfect network; the variance half, if any, is the posterior variance (v = -1)."""
    output = noise - clean if objective.name == "rectified_flow" else noise
    missing = objective.output_channels(clean.shape[-1]) - clean.shape[-1]
    return jnp.concatenate([output, jnp.full((*clean.shape[:-1], missing), -1.0)], axis=-1)


class ContractTest(chex.TestCase):
    """Properties of every objective, jitted or not."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_predict_inverts_perturb(self):
        for config in (FLOW, DDPM, HYBRID):
            objective, clean, noise, times, noisy = example(config)
            output = perfect_output(objective, clean, noise)
            prediction = self.variant(objective.predict)(output, noisy, times)
            # At level 1000 alpha_bar is 4e-5: noise of 1e-7 in x_t is 2e-5 in x_0.
            chex.assert_trees_all_close((prediction.clean, prediction.noise), (clean, noise), atol=2e-4)
            again = self.variant(objective.perturb)(prediction.clean, prediction.noise, times)
            chex.assert_trees_all_close(again, noisy, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_imperfect_prediction_still_splits_the_noisy_input(self):
        for config in (FLOW, DDPM, HYBRID):
            objective, clean, noise, times, noisy = example(config)
            output = perfect_output(objective, clean, noise) + 0.3
            prediction = self.variant(objective.predict)(output, noisy, times)
            assert jnp.abs(prediction.noise - noise).max() > 0.01
            again = self.variant(objective.perturb)(prediction.clean, prediction.noise, times)
            chex.assert_trees_all_close(again, noisy, atol=2e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_loss_is_zero_at_the_truth_and_per_sample_elsewhere(self):
        for config in (FLOW, DDPM):
            objective, clean, noise, times, noisy = example(config)
            loss = self.variant(objective.loss)
            output = perfect_output(objective, clean, noise)
            chex.assert_trees_all_close(loss(output, clean, noise, noisy, times), jnp.zeros(6), atol=1e-12)
            errors = jnp.arange(6.0)
            wrong = output + errors.reshape(6, 1, 1, 1)
            chex.assert_trees_all_close(loss(wrong, clean, noise, noisy, times), errors**2, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_straight_in_its_own_coordinates(self):
        """For fixed data and noise, z = x / scale moves along direction at exactly the rate of the clock."""
        for config in (FLOW, DDPM):
            objective, clean, noise, times, noisy = example(config)
            direction = objective.direction(objective.predict(perfect_output(objective, clean, noise), noisy, times))
            as_column = (-1, 1, 1, 1)
            start = clean / self.variant(objective.scale)(jnp.zeros(6)).reshape(as_column)
            end = noisy / self.variant(objective.scale)(times).reshape(as_column)
            clock = self.variant(objective.clock)(times)
            # Relative to the distance travelled: the clock of DDPM reaches 157.
            travelled = (end - start) / clock.reshape(as_column)
            chex.assert_trees_all_close(travelled[:5], direction[:5], atol=1e-4)
            chex.assert_trees_all_close(self.variant(objective.clock)(jnp.zeros(6)), jnp.zeros(6))


@pytest.mark.parametrize("config", [FLOW, DDPM, HYBRID])
def test_loss_is_float32_for_bfloat16_data(config):
    objective, clean, noise, times, noisy = example(config)
    output = perfect_output(objective, clean, noise) + 0.25
    rounded = [array.astype(jnp.bfloat16) for array in (output, clean, noise, noisy)]
    loss = objective.loss(*rounded, times)
    assert loss.dtype == jnp.float32 and loss.shape == (6,)
    widened = [array.astype(jnp.float32) for array in rounded]
    chex.assert_trees_all_close(loss, objective.loss(*widened, times), rtol=1e-6)


@pytest.mark.parametrize("config", [FLOW, DDPM])
def test_times_count_from_clean_to_pure_noise(config):
    objective = make_objective(config)
    grid = objective.time_grid(20)
    assert grid.shape == (21,) and np.all(np.diff(grid) < 0)
    normalized = np.asarray(objective.normalized(jnp.asarray(grid, jnp.float32)))
    assert normalized[0] == 1.0 and normalized[-1] == 0.0
    signal, sigma = objective.signal_and_sigma(jnp.asarray(grid[[0, -1]], jnp.float32))
    chex.assert_trees_all_close(signal, jnp.array([0.0, 1.0]), atol=0.01)
    chex.assert_trees_all_close(sigma, jnp.array([1.0, 0.0]), atol=1e-4)
    assert signal[1] == 1.0 and sigma[1] == 0.0  # the end of the grid is exactly clean


@pytest.mark.parametrize("config", [FLOW, DDPM])
def test_float64_times_give_float64_coefficients(config, float64):
    objective = make_objective(config)
    times = jnp.asarray(objective.time_grid(7)[:-1])
    signal, sigma = objective.signal_and_sigma(times)
    assert signal.dtype == jnp.float64
    if config.objective == "ddpm":
        chex.assert_trees_all_close(signal**2 + sigma**2, jnp.ones(7), rtol=1e-14)


def test_ddpm_levels():
    objective = make_objective(DDPM)
    levels = jnp.array([0.0, 1.0, 2.0, 1000.0])
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.array([1.0, 1 - betas[0], (1 - betas[0]) * (1 - betas[1]), np.prod(1 - betas)])
    signal, sigma = objective.signal_and_sigma(levels)
    chex.assert_trees_all_close(signal, np.sqrt(alpha_bar).astype(np.float32), rtol=1e-6)
    chex.assert_trees_all_close(sigma, np.sqrt(1 - alpha_bar).astype(np.float32), rtol=1e-6)
    chex.assert_trees_all_close(
        objective.clock(levels), np.sqrt((1 - alpha_bar) / alpha_bar).astype(np.float32), rtol=1e-6
    )
    chex.assert_trees_all_close(objective.network_times(levels[1:]), jnp.array([0.0, 1.0, 999.0]))
    chex.assert_trees_all_close(objective.normalized(levels), levels / 1000)


def test_flow_network_times():
    assert make_objective(FLOW).network_times(jnp.array([0.25]))[0] == 250.0


def test_ddpm_trains_on_every_level_equally():
    objective = make_objective(DiffusionConfig(objective="ddpm", timesteps=10))
    times = objective.sample_times(jax.random.key(0), 20_000)
    assert times.dtype == jnp.float32
    levels, counts = np.unique(np.asarray(times), return_counts=True)
    np.testing.assert_array_equal(levels, np.arange(1, 11))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (0.5, 0.7, 1.0), (-1.0, 1.0, 3.0)])
def test_logit_normal_times(mean, std, shift):
    config = DiffusionConfig(time_distribution="logit_normal", logit_mean=mean, logit_std=std, shift=shift)
    times = np.asarray(make_objective(config).sample_times(jax.random.key(1), 20_000), np.float64)
    unshifted = times / (shift - (shift - 1.0) * times)  # the inverse of s t / (1 + (s - 1) t)
    standard = (np.log(unshifted / (1.0 - unshifted)) - mean) / std
    assert scipy.stats.kstest(standard, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.median(standard), 0.0, atol=5 * 1.2533 / np.sqrt(20_000))


def test_uniform_times():
    config = DiffusionConfig(time_distribution="uniform")
    times = make_objective(config).sample_times(jax.random.key(2), 20_000)
    assert scipy.stats.kstest(np.asarray(times), "uniform").pvalue > 1e-3


def test_shift_moves_the_sampling_grid_towards_noise():
    np.testing.assert_allclose(make_objective(FLOW).time_grid(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    shifted = make_objective(DiffusionConfig(shift=3.0)).time_grid(4)
    np.testing.assert_allclose(shifted, [1.0, 0.9, 0.75, 0.5, 0.0])  # 3t / (1 + 2t)


def test_respacing():
    objective = make_objective(DDPM)
    ten = objective.time_grid(10)
    np.testing.assert_array_equal(ten[:-1] - 1, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0])
    assert ten[-1] == 0
    quarter = objective.time_grid(250)[:-1][::-1] - 1  # timestep indices, rising
    assert len(quarter) == 250 and quarter[0] == 0 and quarter[-1] == 999
    np.testing.assert_array_equal(quarter[:7], [0, 4, 8, 12, 16, 20, 24])
    assert set(np.diff(quarter)) == {4, 5}
    np.testing.assert_array_equal(objective.time_grid(1000), np.arange(1000, -1, -1))
    np.testing.assert_array_equal(objective.time_grid(1), [1000, 0])


def test_respacing_accumulates_its_stride():
    """Any number of steps gives distinct indices up to the last: the running sum of the stride, rounded."""
    objective = make_objective(DDPM)
    for count in (2, 3, 21, 23, 31, 112, 251, 999):
        position, indices = 0.0, []
        for _ in range(count):
            indices.append(round(position))
            position += 999 / (count - 1)
        assert len(set(indices)) == count and indices[-1] == 999
        np.testing.assert_array_equal(objective.time_grid(count)[:-1][::-1] - 1, indices)


def tanh_cdf(x):
    """The normal distribution function as published code has it."""
    return 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def reference_bound(clean, noisy, noise_estimate, v, level, cdf):
    """The bound's term at one level, in bits per dimension, in NumPy from the papers' formulas."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - before) / (1 - alpha_bar)
    log_variance = np.log(np.append(variance[1], variance[1:]))
    i = level - 1
    estimate = noisy / np.sqrt(alpha_bar[i]) - np.sqrt(1 / alpha_bar[i] - 1) * noise_estimate
    weights = (
        betas[i] * np.sqrt(before[i]) / (1 - alpha_bar[i]),
        (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - alpha_bar[i]),
    )
    mean = weights[0] * estimate + weights[1] * noisy
    true_mean = weights[0] * clean + weights[1] * noisy
    fraction = (v + 1) / 2
    model = fraction * np.log(betas[i]) + (1 - fraction) * log_variance[i]
    if level == 1:
        deviation = np.exp(model / 2)
        upper = np.where(clean > 0.999, np.inf, clean + 1 / 255)
        lower = np.where(clean < -0.999, -np.inf, clean - 1 / 255)
        mass = cdf((upper - mean) / deviation) - cdf((lower - mean) / deviation)
        nats = -np.log(np.maximum(mass, 1e-12))
    else:
        nats = 0.5 * (
            model - log_variance[i] + np.exp(log_variance[i] - model) - 1 + (true_mean - mean) ** 2 / np.exp(model)
        )
    return nats.mean() / np.log(2)


@pytest.mark.parametrize("config, cdf", [
    (HYBRID, tanh_cdf), (dataclasses.replace(HYBRID, normal_cdf="exact"), scipy.stats.norm.cdf),
])  # fmt: skip
def test_hybrid_loss_against_numpy(config, cdf):
    objective, clean, noise, times, _ = example(config)
    times = times.at[0].set(1.0)  # a second sample at the decoder's level, on the edges of the data range
    clean = clean.at[0].set(jnp.sign(clean[0]))
    noisy = objective.perturb(clean, noise, times)
    rng = np.random.default_rng(3)
    estimate = noise + 0.1 * rng.normal(size=SHAPE).astype(np.float32)
    v = jnp.asarray(rng.uniform(-1.2, 1.2, size=SHAPE).astype(np.float32))
    loss = objective.loss(jnp.concatenate([estimate, v], -1), clean, noise, noisy, times)
    rows = [np.asarray(a, np.float64) for a in (clean, noisy, estimate, v)]
    bound = np.array([reference_bound(*(a[b] for a in rows), int(times[b]), cdf) for b in range(6)])
    error = np.mean((rows[2] - np.asarray(noise, np.float64)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(loss, error + bound, rtol=2e-3)
    assert np.all(bound > 1e-6)  # so that the term matters


def test_bound_vanishes_at_the_truth_above_level_1():
    objective, clean, noise, times, noisy = example(HYBRID)
    loss = objective.loss(perfect_output(objective, clean, noise), clean, noise, noisy, times)
    chex.assert_trees_all_close(loss[:-1], jnp.zeros(5), atol=1e-5)
    assert loss[-1] > 0.1  # at level 1 the bound is the likelihood of each 8-bit bin


def test_bound_trains_only_the_variance():
    objective, clean, noise, times, noisy = example(HYBRID)
    plain = make_objective(DDPM)
    output = perfect_output(objective, clean, noise) + 0.2

    def total(objective, output):
        return objective.loss(output, clean, noise, noisy, times).sum()

    gradient = jax.jit(jax.grad(lambda output: total(objective, output)))(output)
    noise_only = jax.jit(jax.grad(lambda output: total(plain, output)))(output[..., :3])
    chex.assert_trees_all_close(gradient[..., :3], noise_only, rtol=1e-6)
    assert jnp.all(jnp.abs(gradient[..., 3:]).max(axis=(1, 2, 3)) > 0) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"objective": "score"}, "objective"),
        ({"learned_sigma": True}, "learned_sigma"),
        ({"time_distribution": "cosine"}, "time_distribution"),
        ({"timesteps": 1}, "timesteps"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1e-5}, "beta_end"),
        ({"logit_std": 0.0}, "logit_std"),
        ({"shift": -1.0}, "shift"),
    ],
)
def test_config_refuses_in_one_line(changes, name):
    with pytest.raises(ValueError, match=f"diffusion.{name}|{name}") as refusal:
        DiffusionConfig(**changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config, diffusion_steps", [(FLOW, 0), (DDPM, 0), (DDPM, 1001)])
def test_time_grid_refuses(config, diffusion_steps):
    with pytest.raises(ValueError, match="diffusion_steps"):
        make_objective(config).time_grid(diffusion_steps)


def test_predict_refuses_the_wrong_number_of_channels():
    objective, clean, noise, times, noisy = example(HYBRID)
    with pytest.raises(ValueError, match="6"):
        objective.predict(noise, noisy, times)
