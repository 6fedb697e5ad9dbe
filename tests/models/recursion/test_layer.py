"""The recursion against its plain NumPy reference, for every switch, and with zero experts."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.recursion.small import (
    HEADS,
    IMAGES,
    INTERPRETED,
    SMALL,
    TOKENS,
    WIDTH,
    as_reference,
    build,
    inputs,
    pretend_tpu,
    run,
    run_reference,
    with_zero_up,
)
from trm_diffusion.models.attention import Attention
from trm_diffusion.models.recursion import Recursion
from trm_diffusion.models.recursion.config import GATE_INPUTS, recursive_blocks


def assert_equals_reference(config, *, joint, training, qk_norm=False, steps=None, traced=False):
    """Values, running tokens and divergence at `steps` latent steps, and the base projections with zero experts."""
    steps, key, data = steps or config.latent_steps, jax.random.key(7) if training else None, inputs()
    graphdef, state = build(config, qk_norm=qk_norm)

    @jax.jit
    def forward(state, traced_steps):
        return run(graphdef, state, data, joint=joint, steps=traced_steps if traced else steps, key=key)

    qkv, report = forward(state, steps)
    arguments = as_reference(graphdef, state, data, joint=joint)
    expected = run_reference(arguments, config, steps=steps, key=key)
    np.testing.assert_allclose(qkv, expected.qkv, rtol=1e-5, atol=1e-5 * np.abs(expected.qkv).max())

    choices = 3 if config.routing_scope == "per_projection" else 1
    rows = config.latent_steps if traced else steps  # in the report, latent steps past `steps` are zeros
    running = np.array([*expected.running[:-1], *[0.0] * (rows - steps), 1.0])
    asked = np.array([*[True] * (steps - 1), *[False] * (rows - steps), True])
    chex.assert_shape(report.load, (rows, choices, config.experts))
    np.testing.assert_allclose(report.running, running, rtol=1e-6)
    np.testing.assert_array_equal(report.ran, asked & (running > 0))
    np.testing.assert_allclose(report.load.sum(-1), np.tile(running[:, None] > 0, choices), rtol=1e-6)
    np.testing.assert_allclose(report.halting_divergence[-1], expected.divergence, rtol=1e-5, atol=1e-6)
    if not training:
        np.testing.assert_array_equal(report.drop_fraction, 0.0)

    qkv, _ = forward(with_zero_up(state), steps)
    kernel, bias = arguments["base"]
    base = (np.asarray(data[0]) @ kernel + bias).reshape(IMAGES, TOKENS, 3, WIDTH)
    if config.base_input == "modulated":
        np.testing.assert_allclose(qkv, base, rtol=1e-5, atol=1e-5)
    elif config.residual == "before_norm" and config.base_input == "carry":
        assert np.abs(qkv - base).max() > 0.1


@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
@pytest.mark.parametrize(
    ("latent_steps", "experts", "k"),
    [(t, m, k) for t, m, k in itertools.product((1, 2, 5), (1, 2, 5, 16), (1, 2)) if k <= m],
)
def test_equals_reference(latent_steps, experts, k, joint):
    config = dataclasses.replace(SMALL, latent_steps=latent_steps, experts=experts, experts_per_token=k)
    for training in (False, True):
        assert_equals_reference(config, joint=joint, training=training)


SUBSETS = [",".join(c) for size in (1, 2, 3) for c in itertools.combinations(GATE_INPUTS, size)]
FACTORS = {
    "alpha": (None, 6.0),
    "base_input": ("modulated", "carry", "blend"),
    "base_step_input": ("h", "blend"),
    "base_projections": ("q,k,v", "q", "v,k"),
    "normalization": (True, False),
    "modulation": (True, False),
    "residual": ("before_norm", "after_norm"),
    "pool": ("shared", "per_latent_step"),
    "routing_scope": ("shared", "per_projection"),
    "forward_weight": ("straight_through", "soft"),
    "state": ("restart", "accumulate", "gated"),
    "attended_norm": (False, True),
    "attention_qk_norm": (False, True),
    "expert_mlp": (False, True),
    "step_embedding": (False, True),
    "base_every_step": (False, True),
    "gate_inputs": tuple(SUBSETS),
    "dispatch": ("dense", "capacity", "one_hot"),
    "remat": ("none", "full"),
    "halting": ("none", "convergence", "learned"),
    "truncated_latent_steps": (0, 1, 9),
    "experts_per_token": (1, 2),
    "training": (False, True),
    "joint": (False, True),
    "qk_norm": (False, True),
    "traced": (False, True),
}
SWITCHED = dataclasses.replace(SMALL, latent_steps=4, experts=5, halting_epsilon=0.6)


def pairwise_rows(factors: dict, seed: int = 0) -> list[dict]:
    """Settings that contain every pair of values of every two factors at least once (greedy)."""
    rng = np.random.default_rng(seed)
    names = list(factors)
    left = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }
    rows = []
    while left:
        seed_pair = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        candidates = []
        for _ in range(30):
            row = {name: seed_pair.get(name, values[rng.integers(len(values))]) for name, values in factors.items()}
            covered = {frozenset(pair) for pair in itertools.combinations(row.items(), 2)} & left
            candidates.append((len(covered), len(candidates), row, covered))
        _, _, row, covered = max(candidates, key=lambda c: c[:2])
        left -= covered
        rows.append(row)
    return rows


@pytest.mark.parametrize("row", pairwise_rows(FACTORS), ids=lambda row: "-".join(str(v) for v in row.values()))
def test_every_switch_equals_reference(row):
    row = dict(row)
    call = {name: row.pop(name) for name in ("training", "joint", "qk_norm", "traced")}
    assert_equals_reference(dataclasses.replace(SWITCHED, **row), steps=3, **call)


PLAIN_ALONE = (
    "normalization",
    "modulation",
    "residual",
    "step_embedding",
    "dispatch",
)  # the kernels know only the paper's value
FUSED_FACTORS = {name: values for name, values in FACTORS.items() if name not in PLAIN_ALONE} | {
    "gate_inputs": tuple(subset for subset in SUBSETS if "tokens" in subset)
}


@pytest.mark.parametrize("row", pairwise_rows(FUSED_FACTORS), ids=lambda row: "-".join(str(v) for v in row.values()))
def test_every_switch_that_the_kernels_honour_equals_reference_with_them(row, monkeypatch):
    """In Pallas's interpreter, with each image's tokens split over several programs."""
    row, calls = dict(row), pretend_tpu(monkeypatch, tokens=1)
    call = {name: row.pop(name) for name in ("training", "joint", "qk_norm", "traced")}
    assert_equals_reference(dataclasses.replace(SWITCHED, **row), steps=3, **call)
    assert set(calls) == set(INTERPRETED)


@pytest.mark.parametrize("factors", [FACTORS, FUSED_FACTORS], ids=["plain", "fused"])
def test_pairwise_rows_cover_every_pair(factors):
    rows = pairwise_rows(factors)
    for a, b in itertools.combinations(factors, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(factors[a], factors[b]))


@functools.cache
def at_inference():
    """A recursion's state, and its q, k and v at inference, compiled."""
    graphdef, state = build(dataclasses.replace(SMALL, latent_steps=3, experts=5, experts_per_token=2))
    return state, jax.jit(lambda state, data: run(graphdef, state, data, steps=3, joint=True)[0])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    tokens=st.permutations(range(TOKENS)),
    images=st.permutations(range(IMAGES)),
    experts=st.permutations(range(5)),
)
def test_permutations_of_tokens_images_and_experts(seed, tokens, images, experts):
    """Reordering tokens and images reorders the result. Renaming experts does not change it."""
    (state, forward), data = at_inference(), inputs(seed)
    tokens, images, experts = (np.asarray(order) for order in (tokens, images, experts))
    expected = np.asarray(forward(state, data))
    same = dict(rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(forward(state, (data[0][:, tokens], *data[1:])), expected[:, tokens], **same)
    np.testing.assert_allclose(forward(state, jax.tree.map(lambda leaf: leaf[images], data)), expected[images], **same)
    axes = {"token_kernel": -1, "condition_kernel": -1, "down": -3, "up": -3}
    renamed = nnx.from_flat_state(
        {
            path: jnp.take(v[...], experts, axis=axes[path[-1]]) if path[-1] in axes else v
            for path, v in nnx.to_flat_state(state)
        }
    )
    np.testing.assert_allclose(forward(renamed, data), expected, **same)


def test_with_zero_experts_the_carry_form_doubles_the_base_input():
    """With a_{T-1} + x~ as base input, zero experts give W (2 x~): figure 1 with the equation's residual."""
    graphdef, state = build(dataclasses.replace(SMALL, base_input="carry"))
    data = inputs()
    qkv, _ = run(graphdef, with_zero_up(state), data, steps=2)
    attention, _ = nnx.merge(graphdef, state)
    np.testing.assert_allclose(qkv, attention.project(2 * data[0]).reshape(qkv.shape), rtol=1e-5, atol=1e-5)


def test_both_forms_of_figure_1_together_leave_the_base_in_self_attention():
    """x~ is added after the norm, so a_{T-1} is only the attention, which is zero with zero experts."""
    graphdef, state = build(dataclasses.replace(SMALL, base_input="carry", residual="after_norm"))
    data = inputs()
    qkv, _ = run(graphdef, with_zero_up(state), data, steps=2)
    attention, _ = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(qkv, attention.project(data[0]).reshape(qkv.shape))


STARTS_AS_BASE = {  # forms that leave the base model unchanged at the start
    "step_embedding": dict(step_embedding=True),
    "accumulate": dict(state="accumulate"),
    "gated": dict(state="gated"),
    "blend": dict(base_input="blend"),
    "thinking": dict(base_input="blend", base_every_step=True),
    "thinking_by_blends": dict(base_input="blend", base_every_step=True, base_step_input="blend", state="gated"),
    "expert_mlp": dict(expert_mlp=True),
    "norms": dict(attention_qk_norm=True, attended_norm=True, attended_gain=0.1),
}


@pytest.mark.parametrize("form", STARTS_AS_BASE)
def test_a_form_starts_as_the_base(form):
    """To the bit, with the initial parameters, at every T, also above the config's."""
    config = dataclasses.replace(SMALL, latent_steps=3, **STARTS_AS_BASE[form])
    data = inputs()
    attention = Attention(WIDTH, HEADS, qk_norm=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split((attention, Recursion(WIDTH, HEADS, config, dtype=jnp.float32, rngs=nnx.Rngs(1))))
    for steps in (1, 2, 4):
        qkv, _ = run(graphdef, state, data, joint=True, steps=steps)
        np.testing.assert_array_equal(qkv, attention.project(data[0]).reshape(qkv.shape))


@pytest.mark.parametrize("training", [False, True])
def test_one_program_serves_every_number_of_latent_steps(training):
    config = dataclasses.replace(SMALL, latent_steps=4, experts=3, remat="full")
    graphdef, state = build(config)
    key, data, traces = jax.random.key(5) if training else None, inputs(), []

    @jax.jit
    def at_depth(state, steps):
        traces.append(steps)
        return run(graphdef, state, data, joint=True, steps=steps, key=key)

    arguments = as_reference(graphdef, state, data, joint=True)
    for steps in (1, 2, 3, 4):
        qkv, report = at_depth(state, jnp.asarray(steps))
        expected = run_reference(arguments, config, steps=steps, key=key).qkv
        np.testing.assert_allclose(qkv, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert report.ran.sum() == steps
    assert len(traces) == 1


@pytest.mark.parametrize("latent_steps", [2, 3])
def test_remat_changes_neither_gradients_nor_counts(latent_steps):
    data = inputs()

    def gradients(remat):
        config = dataclasses.replace(SMALL, latent_steps=latent_steps, capacity_factor=0.7, remat=remat)
        graphdef, state = build(config)

        def loss(state):
            qkv, report = run(graphdef, state, data, joint=True, steps=latent_steps, key=jax.random.key(2))
            return jnp.sum(jnp.sin(qkv)), report

        return jax.jit(jax.grad(loss, has_aux=True))(state)

    expected, report = gradients("none")
    assert np.all(report.drop_fraction > 0)
    for remat in ("dots", "full"):
        found, counts = gradients(remat)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(counts, report)


def test_truncated_latent_steps_pass_no_gradient_and_change_no_value():
    """With a pool for each latent step, the pools of the truncated latent steps get exactly zero."""
    data, found = inputs(), {}
    for truncated in (0, 2):
        config = dataclasses.replace(SMALL, latent_steps=4, pool="per_latent_step", truncated_latent_steps=truncated)
        graphdef, state = build(config)

        def loss(state, graphdef=graphdef):
            return jnp.sum(jnp.sin(run(graphdef, state, data, steps=4, key=jax.random.key(2))[0]))

        value, gradient = jax.jit(jax.value_and_grad(loss))(state)
        pool = {path[-1]: np.asarray(v) for path, v in nnx.to_flat_state(nnx.as_pure(gradient)) if "pool" in path}
        found[truncated] = value, pool
    np.testing.assert_allclose(found[2][0], found[0][0], rtol=1e-6)
    for name, whole in found[0][1].items():
        part = found[2][1][name]
        assert np.all(np.any(whole != 0, axis=tuple(range(1, whole.ndim))))
        np.testing.assert_array_equal(part[:2], 0.0)
        np.testing.assert_allclose(part[2:], whole[2:], rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("blocks, depth, expected", [
    ("none", 4, ()), ("all", 3, (0, 1, 2)), ("middle", 28, (14,)), ("12,4,8", 24, (4, 8, 12)), ("0", 1, (0,)),
])  # fmt: skip
def test_recursive_blocks(blocks, depth, expected):
    assert recursive_blocks(blocks, depth) == expected


@pytest.mark.parametrize("blocks", ["most", "4,", "4;8", "-1", "12"])
def test_recursive_blocks_refuses(blocks):
    with pytest.raises(ValueError, match="block"):
        recursive_blocks(blocks, 12)


@pytest.mark.parametrize("scope", ["shared", "per_projection"])
@pytest.mark.parametrize("pool", ["shared", "per_latent_step"])
def test_parameter_count_is_the_docstring_formula(pool, scope):
    config = dataclasses.replace(SMALL, pool=pool, routing_scope=scope, latent_steps=3, experts=5, rank=7)
    recursion = nnx.merge(*build(config))[1]
    pools, choices = (3 if pool == "per_latent_step" else 1), (3 if scope == "per_projection" else 1)
    expected = pools * (6 * 5 * 7 * WIDTH + 2 * choices * 5 * WIDTH)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(recursion))) == expected
