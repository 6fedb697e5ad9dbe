"""A scanned stack equals the unrolled one in weights, values, gradients, reports; its block is traced once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trm_diffusion.models.stack import BlockStack, StackLayout, from_per_layer, per_layer, segment_lengths
from trm_diffusion.runtime.parameters import PureModel

WIDTH = 4


class FakeBlock(nnx.Module):
    """x <- x + tanh(x W + b + noise); its report is the mean of x. `traces` lists the traces."""

    traces: list[bool] = []

    def __init__(self, recursive, key):
        kernel_key, bias_key = jax.random.split(key)
        self.kernel = nnx.Param(jax.random.normal(kernel_key, (WIDTH, WIDTH)))
        self.extra = nnx.Param(jax.random.normal(bias_key, (WIDTH,))) if recursive else None

    def __call__(self, x, *, key, scale):
        FakeBlock.traces.append(self.extra is not None)
        hidden = x @ self.kernel[...]
        if key is not None:
            hidden = hidden + jax.random.normal(key, x.shape)
        if self.extra is None:
            return x + scale * jnp.tanh(hidden), None
        return x + scale * jnp.tanh(hidden + self.extra[...][None]), jnp.mean(x)


class Wrapper(nnx.Module):
    """Puts the stack at the parameter path that it has in a model."""

    def __init__(self, depth, recursive, scan, remat, key):
        self.stack = BlockStack(FakeBlock, kinds_of(depth, recursive), scan=scan, remat=remat, rngs=nnx.Rngs(key))


def kinds_of(depth, recursive) -> list[bool]:
    return [index in recursive for index in range(depth)]


def fake_stack(depth, recursive, *, scan=True, remat="none"):
    """The model, its parameters and its layout."""
    model = PureModel(lambda key: Wrapper(depth, recursive, scan, remat, key))
    layout = StackLayout(tuple(segment_lengths(kinds_of(depth, recursive), scan)), tuple(recursive), scan)
    return model, model.init(jax.random.key(0)), layout


def run(model, parameters, key=None):
    x = jnp.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
    return model.bind(parameters).stack(x, key=key, scale=0.5)


PATTERNS = [(5, ()), (4, (0, 1, 2, 3)), (6, (0, 3, 4)), (3, (1,))]


@pytest.mark.parametrize(("depth", "recursive"), PATTERNS)
def test_the_same_seed_gives_the_same_weights_either_way(depth, recursive):
    (_, scanned, scanned_layout), (_, unrolled, unrolled_layout) = (
        fake_stack(depth, recursive, scan=scan) for scan in (True, False)
    )
    layers = per_layer(scanned, scanned_layout)
    chex.assert_trees_all_equal(layers, per_layer(unrolled, unrolled_layout))
    assert len({np.asarray(layers[f"stack/blocks/{i}/kernel"]).tobytes() for i in range(depth)}) == depth


def test_base_weights_do_not_depend_on_which_blocks_recurse():
    without, some = (per_layer(*fake_stack(6, recursive)[1:]) for recursive in ((), (2, 3)))
    added = some.keys() - without.keys()
    assert added == {"stack/blocks/2/extra", "stack/blocks/3/extra"}
    chex.assert_trees_all_equal({name: some[name] for name in without}, without)


@pytest.mark.parametrize(("depth", "recursive"), PATTERNS)
@pytest.mark.parametrize("training", [False, True])
def test_scanned_equals_unrolled(depth, recursive, training):
    key = jax.random.key(1) if training else None
    (scanned, parameters, layout), (unrolled, other, other_layout) = (
        fake_stack(depth, recursive, scan=scan) for scan in (True, False)
    )
    x, reports = run(scanned, parameters, key)
    expected, expected_reports = run(unrolled, other, key)
    chex.assert_trees_all_close((x, reports), (expected, expected_reports), rtol=1e-5, atol=1e-6)
    gradients, other_gradients = (
        jax.grad(lambda p, model=model: jnp.sum(jnp.sin(run(model, p, key)[0])))(p)
        for model, p in ((scanned, parameters), (unrolled, other))
    )
    chex.assert_trees_all_close(
        per_layer(gradients, layout), per_layer(other_gradients, other_layout), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_gradient(remat, scan):
    def gradients(remat):
        model, parameters, _ = fake_stack(4, (1, 2), scan=scan, remat=remat)
        return jax.grad(lambda p: jnp.sum(jnp.sin(run(model, p, jax.random.key(2))[0])))(parameters)

    chex.assert_trees_all_close(gradients(remat), gradients("none"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_reports_are_those_of_the_recursive_blocks_in_order_of_depth(scan):
    model, parameters, layout = fake_stack(6, (0, 3, 4), scan=scan)
    _, reports = run(model, parameters)
    layers = per_layer(parameters, layout)
    x, expected = jnp.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH), []
    for index in range(6):
        extra = layers.get(f"stack/blocks/{index}/extra")
        if extra is not None:
            expected.append(jnp.mean(x))
        hidden = x @ layers[f"stack/blocks/{index}/kernel"]
        x = x + 0.5 * jnp.tanh(hidden if extra is None else hidden + extra[None])
    chex.assert_shape(reports, (3,))
    np.testing.assert_allclose(reports, expected, rtol=1e-5, atol=1e-6)
    assert run(*fake_stack(3, (), scan=scan)[:2])[1] is None


@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize("recursive", [False, True])
def test_a_scanned_block_is_traced_once_whatever_the_depth(depth, recursive):
    model, parameters, _ = fake_stack(depth, range(depth) if recursive else ())
    FakeBlock.traces.clear()
    jax.jit(lambda p: run(model, p, jax.random.key(0)))(parameters)
    assert FakeBlock.traces == [recursive]


def test_each_segment_is_traced_once_and_an_unrolled_stack_block_by_block():
    for scan, expected in ((True, [False, True, False]), (False, [False, False, True, True, False, False])):
        model, parameters, _ = fake_stack(6, (2, 3), scan=scan)
        FakeBlock.traces.clear()
        jax.jit(lambda p, model=model: run(model, p))(parameters)
        assert FakeBlock.traces == expected


@pytest.mark.parametrize("scan", [True, False])
def test_from_per_layer_undoes_per_layer(scan):
    _, parameters, layout = fake_stack(6, (0, 3, 4), scan=scan)
    parameters |= {"patch_embed/kernel": jnp.ones((2, 3))}  # outside the stack: passes through
    layers = per_layer(parameters, layout)
    chex.assert_trees_all_equal(from_per_layer(layers, list(parameters), layout), parameters)
    assert "patch_embed/kernel" in layers and not any("segments" in name for name in layers)
    # A parameter with a missing layer is omitted; the others remain.
    lacking = {name: value for name, value in layers.items() if name != "stack/blocks/4/extra"}
    found = from_per_layer(lacking, list(parameters), layout)
    (gone,) = parameters.keys() - found.keys()
    assert gone.endswith("/extra")


def test_layers_go_from_one_cut_into_segments_to_another():
    _, plain, plain_layout = fake_stack(6, ())
    _, some, some_layout = fake_stack(6, (2, 3), scan=False)
    names = [name for name in some if name.endswith("kernel")]
    moved = from_per_layer(per_layer(plain, plain_layout), names, some_layout)
    chex.assert_trees_all_equal(moved, {name: some[name] for name in names})


@pytest.mark.parametrize(("depth", "recursive", "scan", "expected"), [
    (4, (), True, [(0, 4)]),
    (4, (0, 1, 2, 3), True, [(0, 4)]),
    (5, (2,), True, [(0, 2), (2, 1), (3, 2)]),
    (5, (0, 3, 4), True, [(0, 1), (1, 2), (3, 2)]),
    (3, (1,), False, [(0, 1), (1, 1), (2, 1)]),
    (1, (0,), True, [(0, 1)]),
])  # fmt: skip
def test_segment_lengths(depth, recursive, scan, expected):
    assert segment_lengths(kinds_of(depth, recursive), scan) == expected
    assert sum(length for _, length in expected) == depth
