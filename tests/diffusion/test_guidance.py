import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_diffusion.diffusion.guidance import combine, guide
from trm_diffusion.diffusion.objective import DiffusionConfig
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.diffusion.samplers import draw_initial_noise, sample

BATCH, CHANNELS = 4, 4
FLOW = make_objective(DiffusionConfig())
HYBRID = make_objective(DiffusionConfig(objective="ddpm", learned_sigma=True))
CONDITION = {"label": jnp.arange(1.0, BATCH + 1)}
NULL = {"label": jnp.zeros(BATCH)}


def outputs(seed=0, channels=CHANNELS):
    conditional, unconditional = np.random.default_rng(seed).normal(size=(2, BATCH, 5, channels))
    return jnp.asarray(conditional, jnp.float32), jnp.asarray(unconditional, jnp.float32)


class CombineTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_formula(self):
        conditional, unconditional = outputs()
        times = jnp.full(BATCH, 0.5)
        for scale in (0.0, 0.5, 1.5, 4.0):
            combined = self.variant(lambda c, u, t, scale=scale: combine(c, u, t, scale=scale, data_channels=4))
            guided = combined(conditional, unconditional, times)
            expected = unconditional + scale * (conditional - unconditional)
            chex.assert_trees_all_close(guided, expected, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_scale_1_is_the_conditional_exactly(self):
        conditional, unconditional = outputs()
        combined = self.variant(lambda c, u, t: combine(c, 1e6 * u, t, scale=1.0, data_channels=4))
        chex.assert_trees_all_equal(combined(conditional, unconditional, jnp.full(BATCH, 0.5)), conditional)

    @chex.variants(with_jit=True, without_jit=True)
    def test_interval_is_per_sample_and_closed(self):
        conditional, unconditional = outputs()
        combined = self.variant(lambda c, u, t: combine(c, u, t, scale=3.0, data_channels=4, interval=(0.25, 0.75)))
        guided = combined(conditional, unconditional, jnp.array([0.2, 0.25, 0.75, 0.8]))
        expected = unconditional + 3.0 * (conditional - unconditional)
        chex.assert_trees_all_close(guided[1:3], expected[1:3], atol=1e-5)
        chex.assert_trees_all_equal((guided[0], guided[3]), (conditional[0], conditional[3]))


def test_dit3_guides_three_channels():
    conditional, unconditional = outputs()
    guided = combine(conditional, unconditional, jnp.ones(BATCH), scale=2.0, data_channels=4, channels="dit3")
    chex.assert_trees_all_close(guided[..., :3], (2 * conditional - unconditional)[..., :3], atol=1e-5)
    chex.assert_trees_all_equal(guided[..., 3], conditional[..., 3])


@pytest.mark.parametrize("channels", ["all", "dit3"])
def test_learned_variance_stays_conditional(channels):
    conditional, unconditional = outputs(channels=8)
    guided = combine(conditional, unconditional, jnp.ones(BATCH), scale=2.0, data_channels=4, channels=channels)
    assert guided.shape == conditional.shape
    chex.assert_trees_all_equal(guided[..., 4:], conditional[..., 4:])
    assert jnp.all(guided[..., :3] != conditional[..., :3])
    assert jnp.all((guided[..., 3] == conditional[..., 3]) == (channels == "dit3"))


def recording_network(seen):
    def network(noisy, network_times, condition):
        seen.append((noisy.shape, network_times, condition))
        label = condition["label"].reshape(-1, 1, 1)
        return label * noisy + network_times.reshape(-1, 1, 1), {"label": condition["label"]}

    return network


def test_guide_evaluates_one_batch_with_null_second():
    seen = []
    guided_network = guide(recording_network(seen), FLOW, CONDITION, NULL, scale=3.0)
    noisy, _ = outputs()
    times = jnp.array([0.1, 0.4, 0.6, 1.0])
    output, aux = guided_network(noisy, times)
    ((shape, network_times, condition),) = seen
    assert shape == (2 * BATCH, 5, CHANNELS)
    chex.assert_trees_all_close(network_times, jnp.concatenate([1000 * times, 1000 * times]))
    chex.assert_trees_all_equal(condition["label"], jnp.array([1.0, 2, 3, 4, 0, 0, 0, 0]))
    chex.assert_trees_all_equal(aux["label"], condition["label"])  # as the network returned it
    expected = 3 * CONDITION["label"].reshape(-1, 1, 1) * noisy + 1000 * times.reshape(-1, 1, 1)
    chex.assert_trees_all_close(output, expected, rtol=1e-5, atol=1e-3)


def test_guide_at_scale_1_never_builds_the_null_half():
    seen = []
    guided_network = guide(recording_network(seen), FLOW, CONDITION, None, scale=1.0)
    noisy, _ = outputs()
    times = jnp.full(BATCH, 0.5)
    output, _ = guided_network(noisy, times)
    assert [shape for shape, _, _ in seen] == [noisy.shape]
    expected, _ = recording_network([])(noisy, 1000 * times, CONDITION)
    chex.assert_trees_all_equal(output, expected)


def test_interval_is_on_normalized_time():
    """DDPM's levels run to 1000: the interval is compared with neither those nor the network's times."""

    def network(noisy, network_times, condition):
        label = jnp.broadcast_to(condition["label"].reshape(-1, 1, 1), noisy.shape)
        return jnp.concatenate([label, label], -1), None

    guided_network = guide(network, HYBRID, CONDITION, NULL, scale=2.0, interval=(0.3, 0.6))
    noisy, _ = outputs()
    output, _ = guided_network(noisy, jnp.array([299.0, 300.0, 600.0, 601.0]))
    chex.assert_trees_all_close(output[:, 0, 0], jnp.array([1.0, 4.0, 6.0, 4.0]))  # labels 1, 2, 3, 4
    chex.assert_trees_all_close(output[:, 0, -1], CONDITION["label"])


def test_guided_sampling_reaches_the_extrapolated_point():
    """For data concentrated on the label, guidance w moves the sample to null + w (label - null)."""

    def network(noisy, network_times, condition):
        times = (network_times / 1000).reshape(-1, 1, 1)
        return (noisy - condition["label"].reshape(-1, 1, 1)) / times, None

    keys = jax.random.split(jax.random.key(0), BATCH)
    noise = draw_initial_noise(keys, (5, CHANNELS))

    @jax.jit
    def run(noise, keys):
        guided_network = guide(network, FLOW, CONDITION, NULL, scale=2.5)
        return sample(guided_network, FLOW, noise, keys, sampler="euler", diffusion_steps=8)[0]

    expected = jnp.broadcast_to(2.5 * CONDITION["label"].reshape(-1, 1, 1), noise.shape)
    chex.assert_trees_all_close(run(noise, keys), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"channels": "dit4"}, "dit4"),
        ({"interval": (0.7, 0.2)}, "interval"),
        ({"interval": (0.0, 2.0)}, "interval"),
    ],
)
def test_guide_refuses_in_one_line(options, word):
    with pytest.raises(ValueError, match=word) as refusal:
        guide(recording_network([]), FLOW, CONDITION, NULL, scale=2.0, **options)
    assert "\n" not in str(refusal.value)
