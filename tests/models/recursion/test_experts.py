"""Dispatch: which tokens a bounded capacity admits, in what order, and that all implementations are equal."""

import fractions
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_diffusion.models.recursion.assignment import assign, expert_capacity, grouped
from trm_diffusion.models.recursion.dispatch import IMPLEMENTATIONS, expert_updates
from trm_diffusion.models.recursion.experts import LowRankExperts
from trm_diffusion.models.recursion.gate import Routing

TOKENS, WIDTH, RANK = 6, 8, 3
COMPILED = {}  # by shape, so that hypothesis does not compile for every example


def random_routing(rng, *, images=4, experts=5, k=2, choices=1, ties=False) -> Routing:
    """A gate decision; with `ties`, its probabilities have few distinct values."""
    shape = (images, TOKENS, choices, experts)
    scores = rng.integers(0, 3, shape).astype(np.float32) if ties else rng.standard_normal(shape, np.float32)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :k].astype(np.int32)
    weights = np.take_along_axis(probabilities, chosen, -1)
    return Routing(*map(jnp.asarray, (chosen, weights, probabilities, scores)))


def assigned(routing: Routing, group: int, capacity: int | None):
    key = (routing.probabilities.shape, routing.experts.shape, group, capacity)
    if key not in COMPILED:
        COMPILED[key] = jax.jit(lambda routing: assign(routing, group, capacity))
    return COMPILED[key](routing)


CASES = dict(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 2, 3), (5, 2, 1), (5, 1, 3)]),  # M, k, P
    group=st.sampled_from([1, 2, 4]),
    factor=st.sampled_from([0.4, 1.0, 1.25, 100.0]),
    ties=st.booleans(),
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(**CASES)
def test_capacity_bounds_every_expert_and_the_probable_and_early_come_first(seed, shape, group, factor, ties):
    experts, k, choices = shape
    routing = random_routing(np.random.default_rng(seed), experts=experts, k=k, choices=choices, ties=ties)
    tokens = group * TOKENS
    capacity = expert_capacity(tokens, experts, k, factor)
    assert capacity == min(tokens, math.ceil(fractions.Fraction(str(factor)) * k * tokens / experts))
    assignment = jax.tree.map(np.asarray, assigned(routing, group, capacity))
    probabilities = np.asarray(grouped(routing.probabilities, group))
    assert assignment.selected.sum() == 4 * TOKENS * choices * k
    assert assignment.dispatched.sum(axis=1).max() <= capacity
    for g, p, m in itertools.product(range(4 // group), range(choices), range(experts)):
        selected = np.flatnonzero(assignment.selected[g, :, p, m])
        in_order = sorted(selected, key=lambda s: (-probabilities[g, s, p, m], s))
        np.testing.assert_array_equal(np.flatnonzero(assignment.dispatched[g, :, p, m]), sorted(in_order[:capacity]))
    np.testing.assert_array_equal(assignment.combine > 0, assignment.dispatched)
    # Slots number the dispatched tokens: each is used once, by expert and then in the order of the tokens.
    for g, p in itertools.product(range(4 // group), range(choices)):
        slot = assignment.slot[g, :, p]
        used = slot[slot < experts * capacity]
        assert len(set(used)) == len(used) == assignment.dispatched[g, :, p].sum()
        for s, j in zip(*np.nonzero(slot < experts * capacity), strict=True):
            m, position = divmod(slot[s, j], capacity)
            assert assignment.dispatched[g, s, p, m] and position == assignment.dispatched[g, :s, p, m].sum()


@pytest.mark.parametrize(("tokens", "experts", "k", "factor", "places"), [
    (100, 2, 1, 1.1, 55), (100, 2, 1, 1.11, 56), (10, 3, 1, 0.3, 1), (7, 1, 1, 1.25, 7), (8, 2, 2, 0.01, 1),
    (1000, 10, 1, 1.15, 115), (2048, 2, 1, 1.25, 1280),
])  # fmt: skip
def test_capacity_is_exact(tokens, experts, k, factor, places):
    assert expert_capacity(tokens, experts, k, factor) == places


@settings(deadline=None, max_examples=20, derandomize=True)
@given(**CASES)
def test_without_a_bound_every_selection_is_dispatched(seed, shape, group, factor, ties):
    experts, k, choices = shape
    routing = random_routing(np.random.default_rng(seed), experts=experts, k=k, choices=choices, ties=ties)
    assignment = assigned(routing, group, None)
    np.testing.assert_array_equal(assignment.dispatched, assignment.selected)
    np.testing.assert_allclose(assignment.combine.sum(-1), grouped(routing.weights, group).sum(-1), rtol=1e-6)


def test_a_token_that_asks_for_nothing_takes_no_capacity():
    """Two tokens of highest probability ask for no expert; the two slots go to the next."""
    probabilities = jnp.asarray([0.9, 0.8, 0.3, 0.2, 0.1, 0.4]).reshape(1, 6, 1, 1)
    experts = jnp.asarray([-1, -1, 0, 0, 0, 0], jnp.int32).reshape(1, 6, 1, 1)
    assignment = assign(Routing(experts, probabilities, probabilities, probabilities), 1, 2)
    assert assignment.dispatched.ravel().tolist() == [False, False, True, False, False, True]
    assert assignment.selected.sum() == 4


def weights_and_tokens(rng, experts, images=4):
    h = rng.standard_normal((images, TOKENS, WIDTH), np.float32)
    down = rng.standard_normal((3, experts, RANK, WIDTH), np.float32)
    up = rng.standard_normal((3, experts, RANK, WIDTH), np.float32)
    return tuple(map(jnp.asarray, (h, down, up)))


def plain_updates(h_gsd, down, up, assignment) -> np.ndarray:
    """Loops over tokens, projections and experts, float64."""
    h, down, up = (np.asarray(a, np.float64) for a in (h_gsd, down, up))
    combine = np.asarray(assignment.combine, np.float64)
    out = np.zeros((*h.shape[:2], 3, h.shape[2]))
    for g, s, p, m in itertools.product(*map(range, h.shape[:2]), range(3), range(up.shape[1])):
        weight = combine[g, s, p if combine.shape[2] == 3 else 0, m]
        out[g, s, p] += weight * (down[p, m] @ h[g, s]) @ up[p, m]
    return out


class DispatchTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(dispatch=(*IMPLEMENTATIONS, "auto"), shape=((2, 1, 3), (5, 2, 1)))
    def test_every_implementation_gives_the_same_values_and_gradients(self, dispatch, shape):
        experts, k, choices = shape
        rng, group = np.random.default_rng(0), 2
        routing = random_routing(rng, experts=experts, k=k, choices=choices)
        h, down, up = weights_and_tokens(rng, experts)
        capacity = expert_capacity(group * TOKENS, experts, k, 1.0)

        def updates(h, down, up, weights, dispatch=dispatch):
            assignment = assign(routing._replace(weights=weights), group, capacity)
            return expert_updates(grouped(h, group), down, up, assignment, capacity, dispatch)

        operands = (h, down, up, routing.weights)
        assignment = assign(routing, group, capacity)
        assert (assignment.selected & ~assignment.dispatched).any()  # some are dropped
        found, backward = jax.vjp(self.variant(updates), *operands)
        np.testing.assert_allclose(found, plain_updates(grouped(h, group), down, up, assignment), rtol=1e-4, atol=1e-4)
        cotangent = jnp.asarray(rng.standard_normal(found.shape, np.float32))
        _, reference = jax.vjp(lambda *operands: updates(*operands, dispatch="dense"), *operands)
        chex.assert_trees_all_close(backward(cotangent), reference(cotangent), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dispatch", IMPLEMENTATIONS)
def test_permutations_of_experts_images_and_tokens(dispatch):
    """Experts renamed: nothing changes. Groups in another order: so are the updates; tokens too, if none is dropped."""
    rng, experts, k, group = np.random.default_rng(1), 5, 2, 2
    routing = random_routing(rng, experts=experts, k=k)
    h, down, up = weights_and_tokens(rng, experts)

    def updates(h, down, up, routing, capacity):
        assignment = assign(routing, group, capacity)
        update = expert_updates(grouped(h, group), down, up, assignment, capacity, dispatch)
        return np.asarray(update).reshape(*h.shape[:2], 3, WIDTH)

    tight, ample = expert_capacity(group * TOKENS, experts, k, 0.8), group * TOKENS
    groups = np.asarray([2, 3, 0, 1])  # the two routing groups change places
    for capacity in (tight, ample):
        expected = updates(h, down, up, routing, capacity)
        order = rng.permutation(experts)  # expert order[m] is now called m
        renamed = routing._replace(
            experts=jnp.argsort(jnp.asarray(order)).astype(jnp.int32)[routing.experts],
            probabilities=routing.probabilities[..., order],
        )
        found = updates(h, down[:, order], up[:, order], renamed, capacity)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

        found = updates(h[groups], down, up, jax.tree.map(lambda leaf: leaf[groups], routing), capacity)
        np.testing.assert_allclose(found, expected[groups], rtol=1e-5, atol=1e-5)

    flat = rng.permutation(4 * TOKENS)  # any order of all tokens, across groups

    def shuffled(leaf):
        return leaf.reshape(4 * TOKENS, *leaf.shape[2:])[flat].reshape(leaf.shape)

    found = updates(shuffled(h), down, up, jax.tree.map(shuffled, routing), ample)
    np.testing.assert_allclose(found, shuffled(updates(h, down, up, routing, ample)), rtol=1e-4, atol=1e-4)


def test_what_the_experts_start_from():
    """A as without the switches, B from zero or normal, both with the stated deviation; alpha / r scales the update."""

    def experts(**options):
        return LowRankExperts(64, 2, 16, dispatch="dense", dtype=jnp.float32, rngs=nnx.Rngs(0), **options)

    plain, other = experts(), experts(init_down=0.5, init_up=0.1, alpha=32.0)
    np.testing.assert_array_equal(plain.up[...], 0.0)
    np.testing.assert_allclose(np.std(plain.down[...]), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(other.down[...], 0.5 * plain.down[...], rtol=1e-6)
    np.testing.assert_allclose(np.std(other.up[...]), 0.1 / 4, rtol=0.05)
    np.testing.assert_allclose(other.weights()[1], 2.0 * other.up[...], rtol=1e-6)
