"""The optimiser against numbers computed by hand: EMA, schedules, weight decay, and clipping."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.jobs.tiny import tiny_config
from trm_diffusion.conditions import make_condition
from trm_diffusion.diffusion.objectives import make_objective
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build, make_model
from trm_diffusion.runtime.optimizer import OptimConfig, ema_decay, learning_rate, make_optimizer, update_ema


class AverageTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_thousand_updates_equal_the_closed_form(self):
        """e_n = d^n e_0 + (1 - d) sum_k d^(n - k) p_k, with bfloat16 parameters whose changes are below bfloat16's."""
        updates, decay = 1000, 0.999
        rng = np.random.default_rng(0)
        walk = 1.0 + np.cumsum(rng.normal(0, 0.01, (updates, 5)), axis=0)
        parameters = jnp.asarray(walk, jnp.bfloat16)
        start = jnp.ones(5, jnp.float32)

        def body(ema, p):
            return update_ema({"w": ema}, {"w": p}, jnp.float32(decay))["w"], None

        ema, _ = self.variant(lambda: jax.lax.scan(body, start, parameters))()
        chex.assert_type(ema, jnp.float32)
        weights = (1 - decay) * decay ** np.arange(updates - 1, -1, -1)
        expected = decay**updates * 1.0 + weights @ np.asarray(parameters, np.float64)
        np.testing.assert_allclose(ema, expected, rtol=1e-5)
        assert np.all(np.abs(expected - 1.0) > 1e-3)  # an EMA that never changes would not pass


def test_an_average_of_a_long_run_stays_near_the_exact_one():
    """20,000 updates at decay 0.9999 of drifting parameters: float32 vs float64. A sum of two products is 3e-4 off."""
    updates, decay = 20_000, np.float32(0.9999)
    rng = np.random.default_rng(0)
    start = rng.normal(size=512).astype(np.float32)
    steps = rng.normal(0, 1e-4, (updates, 512)).astype(np.float32)

    def body(carry, step):
        ema, p = carry
        p = p + step
        return (update_ema({"w": ema}, {"w": p}, decay)["w"], p), p

    (ema, _), parameters = jax.jit(lambda: jax.lax.scan(body, (start, start), steps))()
    expected = start.astype(np.float64)
    for p in np.asarray(parameters, np.float64):
        expected += (1 - np.float64(decay)) * (p - expected)
    assert np.abs(np.asarray(ema) - expected).max() < 1.5e-4


@pytest.mark.parametrize(
    ("update", "expected"), [(0, 1 / 10), (1, 2 / 11), (8, 0.5), (90, 0.91), (8_000, 8_001 / 8_010), (10**6, 0.9999)]
)
def test_warm_up_of_the_decay(update, expected):
    decay = ema_decay(0.9999, jnp.asarray(update), warmup=True)
    chex.assert_type(decay, jnp.float32)
    np.testing.assert_allclose(decay, expected, rtol=1e-6)
    np.testing.assert_allclose(ema_decay(0.9999, jnp.asarray(update), warmup=False), 0.9999, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1)]
)
def test_learning_rate_at_its_corners(schedule, middle, end, warmup):
    total = warmup + 100
    config = OptimConfig(lr=1.0, lr_end=0.1, schedule=schedule, warmup_steps=warmup)
    rate = learning_rate(config, total)
    for update in range(warmup):
        np.testing.assert_allclose(rate(update), (update + 1) / warmup, rtol=1e-6)
    np.testing.assert_allclose(
        [rate(warmup), rate(warmup + 50), rate(total), rate(total + 9)], [1.0, middle, end, end], rtol=1e-6
    )


def test_a_learning_rate_of_zero_stays_zero():
    for schedule in ("constant", "cosine", "linear"):
        rate = learning_rate(OptimConfig(lr=0.0, schedule=schedule, warmup_steps=3), 10)
        assert [float(rate(update)) for update in range(12)] == [0.0] * 12


def test_matrices_alone_decay():
    """With zero gradients, AdamW changes a parameter only by its weight decay."""
    config = tiny_config(model__qk_norm=True)
    shapes = make_model(config, make_objective(config.diffusion), make_condition(config)).shapes
    parameters = {name: jnp.ones(shape.shape) for name, shape in shapes.items()}
    optimizer = make_optimizer(OptimConfig(lr=1.0, weight_decay=0.25), 10)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    undecayed = ("bias", "scale", "embedding")
    for name, update in updates.items():
        expected = 0.0 if name.endswith(undecayed) else -0.25
        np.testing.assert_allclose(update, expected, err_msg=name)
    endings = {name.rsplit("/", 1)[-1] for name in parameters}
    assert {"kernel", "up", "down", "token_kernel", "condition_kernel", *undecayed} <= endings  # all kinds are present


@pytest.mark.parametrize(("clip", "shrunk"), [(0.0, 1.0), (5.0, 0.5), (20.0, 1.0)])
def test_clipping_is_by_the_global_norm(clip, shrunk):
    parameters = {"a/kernel": jnp.zeros(2), "b/bias": jnp.zeros(1)}
    gradients = {"a/kernel": jnp.array([6.0, 0.0]), "b/bias": jnp.array([8.0])}  # of norm 10
    optimizer = make_optimizer(OptimConfig(clip_norm=clip), 10)
    _, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
    first_moment = optax.tree.get(state, "mu")
    chex.assert_trees_all_close(first_moment, jax.tree.map(lambda g: 0.1 * shrunk * g, gradients), rtol=1e-6)


def test_muon_orthogonalises_each_block_and_leaves_the_rest_to_adam():
    """From zero momentum, Muon's update of a matrix has equal singular values, in each of two stacked blocks."""
    rng = np.random.default_rng(0)
    shapes = {
        "stack/blocks/mlp/kernel": (2, 8, 16),
        "stack/blocks/modulation/kernel": (2, 8, 16),
        "embed/kernel": (8, 4),
    }
    parameters = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    gradients = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    optimizer = make_optimizer(OptimConfig(optimizer="muon", lr=1e-2, muon_lr_ratio=3.0), 10)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    update = np.asarray(updates["stack/blocks/mlp/kernel"])
    singular = np.linalg.svd(update, compute_uv=False)  # [2, 8]
    before = np.linalg.svd(np.asarray(gradients["stack/blocks/mlp/kernel"]), compute_uv=False)
    assert np.all(singular.max(1) / singular.min(1) < 2.0) and np.all(before.max(1) / before.min(1) > 2.5)
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 0.2 * 3.0 * 1e-2, rtol=0.3)
    for name in (
        "stack/blocks/modulation/kernel",
        "embed/kernel",
    ):  # the first update of Adam with Nesterov momentum is a sign
        first = 1e-2 * (1 + 0.9 * (1 - 0.9) / (1 - 0.9**2))
        np.testing.assert_allclose(updates[name], -first * np.sign(gradients[name]), rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_are_multiplied_by_pattern(optimizer):
    """Weight decay too, as in a group of its own; the state is that of the optimiser without multipliers."""
    names = ("stack/blocks/0/attention/qkv/kernel", "stack/blocks/0/recursion/pool/experts/up", "recursion/gate/bias")
    parameters = {name: jnp.full((4, 4), 1.0 + i) for i, name in enumerate(names)}
    gradients = {name: jnp.eye(4) * (1.0 + i) for i, name in enumerate(names)}
    config = dict(optimizer=optimizer, lr=1e-2, weight_decay=0.1)
    plain = make_optimizer(OptimConfig(**config), 10)
    several = make_optimizer(OptimConfig(**config, lr_multipliers="*/experts/up=16,*recursion*=0.5"), 10)
    chex.assert_trees_all_equal(several.init(parameters), plain.init(parameters))
    expected, _ = plain.update(gradients, plain.init(parameters), parameters)
    found, _ = several.update(gradients, several.init(parameters), parameters)
    for name, factor in zip(names, (1, 16, 0.5), strict=True):
        assert np.abs(expected[name]).max() > 0
        np.testing.assert_allclose(found[name], factor * expected[name], rtol=1e-6)


@pytest.mark.parametrize("text", ["*/up", "*/up=fast", "=2", "*/up=-1", "*/up=nan", "*/up=inf"])
def test_multipliers_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="^config.optim.lr_multipliers has .*; give PATTERN=FACTOR"):
        tiny_config(optim__lr_multipliers=f"*=1,{text}")


def test_a_multiplier_of_no_parameter_is_refused():
    with pytest.raises(UserError, match="lr_multipliers has '.*/expert/up', which matches no trained parameter"):
        build(tiny_config(optim__lr_multipliers="*/experts/up=2,*/expert/up=2"))
