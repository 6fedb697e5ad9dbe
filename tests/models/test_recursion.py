"""The recursion against its plain NumPy reference, over every switch, and what holds while the experts are zero."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import reference
from trm_diffusion.models.attention import Attention, Context
from trm_diffusion.models.gate import GATE_INPUTS, Conditioning
from trm_diffusion.models.recursion import Recursion, RecursionConfig, recursive_blocks

IMAGES, TOKENS, WIDTH, HEADS, TEXT = 4, 3, 8, 2, 5
SMALL = RecursionConfig(blocks="all", rank=3, routing_group=2, capacity_factor=1.0, remat="none")


def build(config: RecursionConfig, *, qk_norm=False, zero_up=False, seed=0):
    """A recursion and its block's attention, every weight random but (if asked) the experts' second map."""

    def modules():
        rngs = nnx.Rngs(0)
        attention = Attention(WIDTH, HEADS, qk_norm=qk_norm, dtype=jnp.float32, rngs=rngs)
        return attention, Recursion(WIDTH, HEADS, config, dtype=jnp.float32, rngs=rngs)

    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(modules))
    values = {
        path: np.zeros(v.shape, np.float32)
        if zero_up and path[-1] == "up"
        else 0.5 * rng.standard_normal(v.shape, np.float32)
        for path, v in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(jax.tree.map(jnp.asarray, values)))


def inputs(seed=1):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    shift, scale, timestep, condition = (normal(IMAGES, WIDTH) for _ in range(4))
    context = tuple(normal(IMAGES, TEXT, HEADS, WIDTH // HEADS) for _ in range(2))
    return normal(IMAGES, TOKENS, WIDTH), 0.3 * shift, 0.3 * scale, Conditioning(timestep, condition), context


def run(attention, recursion, *, joint, steps, key=None, data=None):
    """The q, k, v that the block's own attention would see, [B, N, 3, D], and the report."""
    x, shift, scale, conditioning, context = data or inputs()
    out = recursion(
        x,
        shift_bd=shift,
        scale_bd=scale,
        conditioning=conditioning,
        attend=lambda qkv: attention.attend(qkv, Context(*context) if joint else None),
        project_base=attention.project,
        latent_steps=steps,
        key=key,
    )
    qkv = attention.project(out.base_input) + out.update
    return qkv.reshape(IMAGES, TOKENS, 3, WIDTH), out.report


def run_reference(attention, recursion, *, joint, steps, key=None):
    config = recursion.config
    x, shift, scale, conditioning, context = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), inputs())
    flat = {path[-1]: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(recursion))}
    pools = (
        [flat] if config.pool == "shared" else [{k: v[t] for k, v in flat.items()} for t in range(config.latent_steps)]
    )
    choices = 3 if config.routing_scope == "per_projection" else 1
    gumbel = None
    if key is not None:
        shape = (IMAGES, TOKENS, choices, config.experts)
        gumbel = [np.asarray(jax.random.gumbel(jax.random.fold_in(key, t), shape), np.float64) for t in range(steps)]
    norms = None
    if attention.query_norm is not None:
        norms = [np.asarray(norm.scale[...], np.float64) for norm in (attention.query_norm, attention.key_norm)]
    base = [np.asarray(v[...], np.float64) for v in (attention.qkv.kernel, attention.qkv.bias)]
    return reference.recursion(
        x, shift, scale, conditioning.timestep, conditioning.condition, pools, base, HEADS, config,
        steps=steps, gumbel=gumbel, norms=norms, context=context if joint else None,
    )  # fmt: skip


def assert_equals_reference(config, *, joint, training, qk_norm=False):
    key = jax.random.key(7) if training else None
    attention, recursion = build(config, qk_norm=qk_norm)
    graphdef, state = nnx.split((attention, recursion))
    step = jax.jit(lambda state: run(*nnx.merge(graphdef, state), joint=joint, steps=config.latent_steps, key=key))
    qkv, report = step(state)
    expected = run_reference(attention, recursion, joint=joint, steps=config.latent_steps, key=key)
    np.testing.assert_allclose(qkv, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    choices = 3 if config.routing_scope == "per_projection" else 1
    chex.assert_shape(report.load, (config.latent_steps, choices, config.experts))
    np.testing.assert_allclose(report.load.sum(-1), 1.0, rtol=1e-6)
    if not training:
        np.testing.assert_array_equal(report.drop_fraction, 0.0)


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
    "base_input": ("modulated", "carry"),
    "normalization": (True, False),
    "modulation": (True, False),
    "residual": ("before_norm", "after_norm"),
    "pool": ("shared", "per_latent_step"),
    "routing_scope": ("shared", "per_projection"),
    "forward_weight": ("straight_through", "soft"),
    "base_every_step": (False, True),
    "gate_inputs": tuple(SUBSETS),
    "dispatch": ("dense", "capacity"),
    "remat": ("none", "full"),
    "experts_per_token": (1, 2),
    "training": (False, True),
    "joint": (False, True),
    "qk_norm": (False, True),
}


def pairwise_rows(factors: dict, seed: int = 0) -> list[dict]:
    """Settings in which every pair of values of every two factors occurs together at least once (greedy)."""
    rng = np.random.default_rng(seed)
    names = list(factors)
    left = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }
    rows = []
    while left:
        seed_pair = dict(next(iter(sorted(left, key=str))))
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
    call = {name: row.pop(name) for name in ("training", "joint", "qk_norm")}
    assert_equals_reference(dataclasses.replace(SMALL, latent_steps=3, experts=5, **row), **call)


def test_pairwise_rows_cover_every_pair():
    rows = pairwise_rows(FACTORS)
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
@pytest.mark.parametrize("residual", ["before_norm", "after_norm"])
@pytest.mark.parametrize("base_every_step", [False, True])
@pytest.mark.parametrize(("latent_steps", "experts", "k"), [(1, 1, 1), (2, 2, 1), (5, 5, 2)])
def test_zero_experts_leave_the_base(latent_steps, experts, k, residual, base_every_step, joint):
    config = dataclasses.replace(
        SMALL, latent_steps=latent_steps, experts=experts, experts_per_token=k, residual=residual,
        base_every_step=base_every_step,
    )  # fmt: skip
    attention, recursion = build(config, zero_up=True)
    qkv, _ = run(attention, recursion, joint=joint, steps=latent_steps, key=jax.random.key(3))
    x = inputs()[0]
    np.testing.assert_array_equal(qkv, attention.project(x).reshape(IMAGES, TOKENS, 3, WIDTH))


def test_the_carry_form_does_not_leave_the_base():
    """With a_{T-1} + x~ as base input, zero experts give W (2 x~): figure 1 taken with the equation's residual."""
    attention, recursion = build(dataclasses.replace(SMALL, base_input="carry"), zero_up=True)
    qkv, _ = run(attention, recursion, joint=False, steps=2)
    x = inputs()[0]
    twice = attention.project(2 * x).reshape(IMAGES, TOKENS, 3, WIDTH)
    np.testing.assert_allclose(qkv, twice, rtol=1e-5, atol=1e-5)
    assert np.abs(qkv - attention.project(x).reshape(qkv.shape)).max() > 0.1


def test_both_forms_of_figure_1_together_leave_the_base_in_self_attention():
    """x~ joins after the norm, so a_{T-1} is the attention alone, which is zero with zero experts."""
    config = dataclasses.replace(SMALL, base_input="carry", residual="after_norm")
    attention, recursion = build(config, zero_up=True)
    qkv, _ = run(attention, recursion, joint=False, steps=2)
    np.testing.assert_array_equal(qkv, attention.project(inputs()[0]).reshape(qkv.shape))


@pytest.mark.parametrize("training", [False, True])
def test_traced_latent_steps_equal_fixed_ones(training):
    config = dataclasses.replace(SMALL, latent_steps=4, experts=3, remat="full")
    attention, recursion = build(config)
    graphdef, state = nnx.split((attention, recursion))
    key = jax.random.key(5) if training else None
    traces = []

    @jax.jit
    def any_depth(state, steps):
        traces.append(steps)
        return run(*nnx.merge(graphdef, state), joint=True, steps=steps, key=key)

    for steps in (1, 2, 3, 4):
        fixed, fixed_report = run(attention, recursion, joint=True, steps=steps, key=key)
        traced, report = any_depth(state, jnp.asarray(steps))
        np.testing.assert_allclose(traced, fixed, rtol=1e-5, atol=1e-5)
        assert report.ran.sum() == steps
        np.testing.assert_allclose(report.load[-1], fixed_report.load[-1], rtol=1e-6)
    assert len(traces) == 1


def test_remat_changes_no_gradient():
    def gradients(remat):
        attention, recursion = build(dataclasses.replace(SMALL, latent_steps=3, remat=remat))
        graphdef, state = nnx.split(recursion)

        def loss(state):
            qkv, _ = run(attention, nnx.merge(graphdef, state), joint=True, steps=3, key=jax.random.key(2))
            return jnp.sum(jnp.sin(qkv))

        return jax.jit(jax.grad(loss))(state)

    expected = gradients("none")
    for remat in ("dots", "full"):
        chex.assert_trees_all_close(gradients(remat), expected, rtol=1e-5, atol=1e-6)


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
    _, recursion = build(config)
    pools, choices = (3 if pool == "per_latent_step" else 1), (3 if scope == "per_projection" else 1)
    expected = pools * (6 * 5 * 7 * WIDTH + 2 * choices * 5 * WIDTH)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(recursion))) == expected
