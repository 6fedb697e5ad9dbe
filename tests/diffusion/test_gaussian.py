import chex
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from trm_diffusion.diffusion import gaussian

ALPHA_BAR = np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))])  # [1001]


@pytest.mark.parametrize("level, cleaner", [(1000, 999), (500, 499), (2, 1), (1000, 0), (750, 250)])
def test_posterior_is_the_conditional_of_the_joint_gaussian(level, cleaner):
    signal, sigma = np.sqrt(ALPHA_BAR[level]), np.sqrt(1.0 - ALPHA_BAR[level])
    cleaner_signal, cleaner_sigma = np.sqrt(ALPHA_BAR[cleaner]), np.sqrt(1.0 - ALPHA_BAR[cleaner])
    found = gaussian.posterior(signal, sigma, cleaner_signal, cleaner_sigma)
    # Given x_0, (x_s, x_t) are jointly normal; Cov(x_s, x_t) = r Var(x_s), and r = signal_t / signal_s.
    ratio = signal / cleaner_signal
    slope = ratio * cleaner_sigma**2 / sigma**2
    np.testing.assert_allclose(found.noisy_weight, slope, rtol=1e-9)
    np.testing.assert_allclose(found.clean_weight, cleaner_signal - slope * signal, rtol=1e-9)
    np.testing.assert_allclose(found.variance, cleaner_sigma**2 - slope * ratio * cleaner_sigma**2, rtol=1e-9)
    np.testing.assert_allclose(found.forward_variance, 1.0 - ALPHA_BAR[level] / ALPHA_BAR[cleaner], rtol=1e-9)


def test_posterior_keeps_its_precision_in_float32():
    signal, sigma = np.sqrt(ALPHA_BAR), np.sqrt(1.0 - ALPHA_BAR)
    levels = signal[1:], sigma[1:], signal[:-1], sigma[:-1]
    exact = gaussian.posterior(*levels)
    rounded = gaussian.posterior(*(jnp.asarray(values, jnp.float32) for values in levels))
    chex.assert_trees_all_close(tuple(rounded), tuple(exact), rtol=1e-4)
    # The textbook difference is wrong by more than that, which is why it is not used.
    textbook = 1.0 - (signal[1:].astype(np.float32) / signal[:-1].astype(np.float32)) ** 2
    assert np.max(np.abs(textbook / exact.forward_variance - 1.0)) > 1e-4


class NormalKLTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_known_values(self):
        kl = self.variant(gaussian.normal_kl)
        zero, one = jnp.zeros(()), jnp.ones(())
        np.testing.assert_allclose(kl(one, zero, one, zero), 0.0, atol=1e-7)
        np.testing.assert_allclose(kl(zero, zero, one, zero), 0.5, rtol=1e-6)
        # sigma 1 against sigma 2: log 2 + 1/8 - 1/2
        np.testing.assert_allclose(kl(zero, zero, zero, jnp.log(4.0)), np.log(2.0) - 0.375, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_integral(self):
        first, second = scipy.stats.norm(0.3, 0.7), scipy.stats.norm(-0.4, 1.3)
        expected, _ = scipy.integrate.quad(lambda x: first.pdf(x) * (first.logpdf(x) - second.logpdf(x)), -8, 8)
        values = (jnp.asarray(v) for v in (0.3, 2 * np.log(0.7), -0.4, 2 * np.log(1.3)))
        np.testing.assert_allclose(self.variant(gaussian.normal_kl)(*values), expected, rtol=1e-5)


@pytest.mark.parametrize("mean, deviation", [(0.1, 0.02), (-0.97, 0.3), (0.97, 0.3), (0.0, 0.004)])
def test_discretized_likelihood_against_scipy(mean, deviation):
    values = np.arange(256) / 127.5 - 1.0  # [256] every 8-bit value
    upper = np.append(values[:-1] + 1 / 255, np.inf)
    lower = np.append(-np.inf, values[1:] - 1 / 255)
    normal = scipy.stats.norm(mean, deviation)
    mass = np.where(values > mean, normal.sf(lower) - normal.sf(upper), normal.cdf(upper) - normal.cdf(lower))
    operands = jnp.asarray(values, jnp.float32), jnp.full(256, mean), jnp.full(256, 2 * np.log(deviation))
    found = gaussian.discretized_log_likelihood(*operands, normal_cdf="exact")
    likely = mass > 1e-9
    np.testing.assert_allclose(found[likely], np.log(mass[likely]), rtol=2e-3)
    np.testing.assert_allclose(np.exp(found).sum(), 1.0, rtol=1e-4)
    assert np.all(np.isfinite(found))


def published_log_likelihood(values, mean, log_deviation):
    """Improved DDPM's and DiT's discretized Gaussian, in float64 from its formula."""

    def cdf(x):
        return 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))

    upper, lower = (cdf((values - mean + sign / 255) * np.exp(-log_deviation)) for sign in (1, -1))
    inner = np.log(np.maximum(upper - lower, 1e-12))
    highest, lowest = np.log(np.maximum(1.0 - lower, 1e-12)), np.log(np.maximum(upper, 1e-12))
    return np.where(values < -0.999, lowest, np.where(values > 0.999, highest, inner))


@pytest.mark.parametrize("mean, deviation", [(0.1, 0.02), (-0.97, 0.3), (0.97, 0.3), (0.0, 0.004), (0.3, 0.01)])
def test_discretized_likelihood_is_the_published_one_by_default(mean, deviation):
    values = np.arange(256) / 127.5 - 1.0
    found = gaussian.discretized_log_likelihood(
        jnp.asarray(values, jnp.float32), jnp.full(256, mean), jnp.full(256, 2 * np.log(deviation))
    )
    expected = published_log_likelihood(values, mean, np.log(deviation))
    likely = expected > np.log(1e-9)
    np.testing.assert_allclose(found[likely], expected[likely], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(np.exp(found).sum(), 1.0, rtol=1e-4)
    assert np.all(np.isfinite(found))


def test_the_tanh_form_is_not_the_exact_one():
    """Where DiT trains at timestep 0: a deviation of 0.01 and a mean that is off by a bin and a half."""
    operands = jnp.zeros(()), jnp.asarray(3 / 255), jnp.asarray(2 * np.log(0.01))
    tanh, exact = (gaussian.discretized_log_likelihood(*operands, normal_cdf=name) for name in ("tanh", "exact"))
    assert 1e-5 < abs(tanh / exact - 1) < 0.02
