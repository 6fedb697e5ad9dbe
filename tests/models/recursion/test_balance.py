"""Balance: the auxiliary losses against their formulas, and the selection bias that balances a skewed gate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from tests.models.recursion.small import SMALL, build, inputs, run
from trm_diffusion.models.recursion.balance import auxiliary_loss, moved_biases, switch_loss, z_loss
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.gate import Conditioning, Gate
from trm_diffusion.models.recursion.report import RoutingReport
from trm_diffusion.models.stack import StackLayout

BLOCKS, STEPS, CHOICES, EXPERTS = 2, 3, 1, 4


def reports(load, importance=None, ran=(1, 1, 1), **fields) -> RoutingReport:
    """The same `load` and `importance` [M] in every block and in the latent steps that ran, zero in the others."""
    ran = jnp.tile(jnp.asarray(ran, jnp.float32), (BLOCKS, 1))

    def spread(values):
        return ran[..., None, None] * jnp.asarray(values, jnp.float32).reshape(1, 1, 1, EXPERTS)

    zeros = jnp.zeros((BLOCKS, STEPS))
    report = RoutingReport(
        load=spread(load), importance=spread(load if importance is None else importance), drop_fraction=zeros,
        entropy=zeros, squared_logsumexp=zeros, ran=ran, running=ran, halting_divergence=zeros,
    )  # fmt: skip
    return report._replace(**fields)


class LossTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters([(1, 1, 1)], [(1, 0, 1)])
    def test_switch_loss_is_one_at_balance_and_more_when_skewed(self, ran):
        loss = self.variant(switch_loss)
        even, skewed, collapsed = [0.25] * 4, [0.4, 0.3, 0.2, 0.1], [1.0, 0, 0, 0]
        np.testing.assert_allclose(loss(reports(even, ran=ran)), 1.0, rtol=1e-6)
        np.testing.assert_allclose(loss(reports(skewed, ran=ran)), 4 * (0.16 + 0.09 + 0.04 + 0.01), rtol=1e-6)
        np.testing.assert_allclose(loss(reports(collapsed, ran=ran)), 4.0, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_z_loss_is_the_mean_over_the_latent_steps_that_ran(self):
        squared = jnp.asarray([[1.0, 100.0, 3.0], [5.0, 100.0, 7.0]])
        given = reports([0.25] * 4, ran=(1, 0, 1), squared_logsumexp=squared)
        np.testing.assert_allclose(self.variant(z_loss)(given), 4.0, rtol=1e-6)


def test_the_report_of_a_recursion_holds_what_the_losses_need():
    """load, importance and squared logsumexp against the gate's decision, and the gradient of the Switch loss."""
    config = RecursionConfig(**vars(SMALL) | dict(experts=EXPERTS, latent_steps=1, temperature=1.0))
    graphdef, state = build(config)
    data, (_, recursion) = inputs(), nnx.merge(graphdef, state)
    _, report = run(graphdef, state, data, steps=1)
    x, shift, scale, conditioning, _ = data
    h = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    h = h * (1 + scale[:, None]) + shift[:, None]
    logits = np.asarray(recursion.pool.gate.logits(h, conditioning)[:, :, 0], np.float64).reshape(-1, EXPERTS)
    load = np.bincount(logits.argmax(-1), minlength=EXPERTS) / len(logits)
    importance = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(report.load[0, 0], load, rtol=1e-6)
    np.testing.assert_allclose(report.importance[0, 0], importance, rtol=1e-4)
    np.testing.assert_allclose(report.squared_logsumexp[0], (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rtol=1e-4)
    given = jax.tree.map(lambda leaf: leaf[None], report)
    np.testing.assert_allclose(switch_loss(given), EXPERTS * (load * importance).sum(), rtol=1e-4)
    slope = jax.grad(lambda importance: switch_loss(given._replace(importance=importance)))(given.importance)
    np.testing.assert_allclose(slope[0, 0, 0], EXPERTS * load, rtol=1e-5)


def test_auxiliary_loss_is_none_by_default_and_the_weighted_sum_otherwise():
    given = reports(
        [0.4, 0.3, 0.2, 0.1],
        squared_logsumexp=jnp.full((BLOCKS, STEPS), 2.0),
        halting_divergence=jnp.zeros((BLOCKS, STEPS)).at[:, -1].set(jnp.asarray([1.0, 3.0])),
    )
    assert auxiliary_loss(given, RecursionConfig()) == 0.0 and auxiliary_loss(None, RecursionConfig()) == 0.0
    config = RecursionConfig(switch_loss_weight=0.5, z_loss_weight=0.25, halting="learned", halting_weight=0.125)
    np.testing.assert_allclose(auxiliary_loss(given, config), 0.5 * 1.2 + 0.25 * 2.0 + 0.125 * 2.0, rtol=1e-6)


@pytest.mark.parametrize("pool", ["shared", "per_latent_step"])
@pytest.mark.parametrize("scan", [True, False])
def test_the_bias_of_an_underused_expert_rises_by_the_rate(scan, pool):
    """Blocks 1 and 2 of four recurse; each bias follows the load of its own block (and latent step)."""
    segments = ((0, 1), (1, 2), (3, 1)) if scan else ((0, 1), (1, 1), (2, 1), (3, 1))
    layout = StackLayout(segments, (1, 2), scan)
    config = RecursionConfig(balance_bias_rate=0.1, pool=pool, latent_steps=STEPS)
    given = reports([0.7, 0.3, 0.0, 0.0])
    given = given._replace(load=given.load.at[1].set(jnp.asarray([0.25, 0.25, 0.1, 0.4])))
    pools = (STEPS,) if pool == "per_latent_step" else ()
    names = ["stack/segments/1/blocks/gate/balance_bias", "stack/segments/2/blocks/gate/balance_bias"]
    shapes = [(2, *pools, CHOICES, EXPERTS)] if scan else [(*pools, CHOICES, EXPERTS)] * 2
    biases = {name: jnp.ones(shape) for name, shape in zip(names, shapes, strict=False)}
    moved = moved_biases(biases, given, layout, config)
    expected = 1 + 0.1 * np.asarray([[-1, -1, 1, 1], [0, 0, 1, -1]])
    for block in range(2):
        found = moved[names[0]][block] if scan else moved[names[block]]
        np.testing.assert_allclose(found, np.broadcast_to(expected[block], found.shape), rtol=1e-6)


@pytest.mark.parametrize("pool", ["shared", "per_latent_step"])
def test_a_latent_step_in_which_all_tokens_had_stopped_counts_for_nothing(pool):
    """In training it is computed all the same; the losses and the bias are those of the latent steps that ran."""
    fields = dict(experts=EXPERTS, latent_steps=STEPS, pool=pool, halting="convergence", halting_epsilon=1e6)
    config = RecursionConfig(**vars(SMALL) | fields | dict(balance_bias_rate=0.1))
    graphdef, state = build(config)
    _, report = run(graphdef, state, inputs(), steps=STEPS, key=jax.random.key(0))
    given, ran = jax.tree.map(lambda leaf: leaf[None], report), np.array([0, 2])
    np.testing.assert_array_equal(report.ran, [1, 0, 1])
    np.testing.assert_allclose(z_loss(given), np.mean(report.squared_logsumexp[ran]), rtol=1e-6)
    name = "stack/segments/0/blocks/gate/balance_bias"
    bias = jnp.zeros((STEPS, CHOICES, EXPERTS) if pool == "per_latent_step" else (CHOICES, EXPERTS))
    moved = moved_biases({name: bias}, given, StackLayout(((0, 1),), (0,), False), config)[name]
    load = np.asarray(report.load)
    expected = np.sign(1 / EXPERTS - load) if pool == "per_latent_step" else np.sign(2 / EXPERTS - load[ran].sum(0))
    if pool == "per_latent_step":
        expected[1] = 0
    np.testing.assert_allclose(moved, 0.1 * expected, rtol=1e-6)


def test_the_bias_makes_a_skewed_gate_even():
    """An untrained gate that sends most tokens to one expert is balanced after a few hundred updates of the bias."""
    gate = Gate(8, EXPERTS, balance_bias=True, temperature=1.0, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(0), (1, 512, 8))
    conditioning = Conditioning(jnp.ones((1, 8)), jnp.zeros((1, 8)))
    gate.condition_kernel[...] = jnp.zeros((8, 1, EXPERTS)).at[:, 0, 0].set(0.25)  # two more for expert 0
    gate.token_kernel[...] *= 20
    graphdef, state = nnx.split(gate)
    layout, config = StackLayout(((0, 1),), (0,), False), RecursionConfig(balance_bias_rate=0.01)
    name, path = "stack/segments/0/blocks/gate/balance_bias", ("balance_bias",)
    flat = {p: v[...] for p, v in nnx.to_flat_state(state)}

    def load_at(bias):
        routing = nnx.merge(graphdef, nnx.from_flat_state(flat | {path: bias}))(h, conditioning, None)
        return jnp.mean(jax.nn.one_hot(routing.experts[0, :, 0, 0], EXPERTS), axis=0), routing

    def move(bias, _):
        load, _ = load_at(bias)
        given = reports([0.0] * 4)._replace(load=load.reshape(1, 1, 1, EXPERTS), ran=jnp.ones((1, 1)))
        return moved_biases({name: bias}, given, layout, config)[name], load

    bias, loads = jax.lax.scan(move, flat[path], None, length=600)
    assert loads[0].max() > 0.6
    np.testing.assert_allclose(loads[-50:].mean(0), 0.25, atol=0.02)
    # The bias only changes the selection.
    _, plain = load_at(jnp.zeros_like(bias))
    _, biased = load_at(bias)
    np.testing.assert_array_equal(biased.probabilities, plain.probabilities)
    np.testing.assert_array_equal(biased.weights, 1.0)
