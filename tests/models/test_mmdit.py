"""The MMDiT: the published size, a block against plain NumPy, and what its recursion computes and what not."""

import dataclasses

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.recursion import reference
from tests.models.test_dit import randomized
from trm_diffusion.models.embed import cropped_sincos_positions, sincos_positions
from trm_diffusion.models.mmdit import (
    SD3_MEDIUM,
    BlockKind,
    JointConfig,
    MMDiT,
    MMDiTBlock,
    MMDiTConfig,
    block_kinds,
)
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.recursion.gate import Conditioning
from trm_diffusion.models.stack import StackLayout, from_per_layer, per_layer
from trm_diffusion.models.text import Text
from trm_diffusion.models.transformer import layout_of
from trm_diffusion.runtime.parameters import PureModel, count

WIDTH, HEADS, TOKENS, TEXT = 8, 2, 4, 5  # of a block
IMAGES, SIZE, CHANNELS, FEATURES, POOLED = 3, 4, 2, 6, 5  # and of a model
RECURSION = RecursionConfig(blocks="1,2", rank=3, experts=3, latent_steps=3, routing_group=1, remat="none")


def config_of(recursion=RECURSION, **fields) -> MMDiTConfig:
    joint = JointConfig(
        position_max_size=4,
        position_base_size=2,
        **{name: fields.pop(name) for name in ("dual_attention_blocks", "mask_padding") if name in fields},
    )
    sizes = dict(depth=3, width=WIDTH, heads=HEADS, patch=2, dtype="float32")
    return MMDiTConfig(**sizes | fields, recursion=recursion, mmdit=joint)


def layout(config: MMDiTConfig) -> StackLayout:
    return layout_of(config, block_kinds(config))


def pure(config: MMDiTConfig, *, size=SIZE, channels=CHANNELS, features=FEATURES, pooled=POOLED) -> PureModel:
    return PureModel(
        lambda key: MMDiT(
            config, image_size=size, in_channels=channels, out_channels=channels, text_features=features,
            pooled_features=pooled, rngs=nnx.Rngs(key),
        )
    )  # fmt: skip


def data(seed=1):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], bool)
    text = Text(normal(IMAGES, TEXT, FEATURES), mask, normal(IMAGES, POOLED))
    return normal(IMAGES, SIZE, SIZE, CHANNELS), jnp.linspace(1.0, 999.0, IMAGES), text


def run(model: PureModel, parameters: dict, inputs=None, **options):
    return jax.jit(lambda parameters, inputs: model.bind(parameters)(*inputs, **options))(parameters, inputs or data())


def test_sd3_medium_has_the_published_parameters():
    """Added up by hand from the published shapes. The position table, 192 x 192 x 1536 more, is not a parameter."""
    d, depth = SD3_MEDIUM["width"], SD3_MEDIUM["depth"]

    def linear(inside, outside):
        return inside * outside + outside

    stream = linear(d, 6 * d) + 4 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    last_text = linear(d, 2 * d) + 3 * linear(d, d)
    embeddings = linear(4 * 16, d) + linear(256, d) + linear(2048, d) + 2 * linear(d, d) + linear(4096, d)
    final = linear(d, 2 * d) + linear(d, 4 * 16)
    expected = (2 * depth - 1) * stream + last_text + embeddings + final
    model = pure(MMDiTConfig(**SD3_MEDIUM), size=128, channels=16, features=4096, pooled=2048)
    assert count(model.shapes) == expected == 2_028_328_000


# A block in plain NumPy.


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference_block(weights, kind, config, x, text, conditioning):
    """One image's block: visual [N, D], text [L, D] without padding, conditioning two vectors [D] -> visual, text."""

    def linear(name, values):
        return values @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

    def modulated(values, shift, scale):
        return np.stack([reference.layer_norm(row) for row in values]) * (1 + scale) + shift

    def norms(name):
        return [weights[f"{name}/{which}/scale"] for which in ("query_norm", "key_norm")] if config.qk_norm else None

    def heads(name, values, own_norms):
        """q, k, v [rows, H, d], q and k normalised."""
        qkv = np.moveaxis(linear(f"{name}/qkv", values).reshape(len(values), 3, HEADS, -1), 1, 0)
        for part in range(2 if own_norms else 0):
            qkv[part] = [[reference.rms_norm(h, own_norms[part]) for h in row] for row in qkv[part]]
        return qkv

    def attend(q, k, v):
        out = np.zeros(q.shape)
        for head in range(HEADS):
            for row in range(len(q)):
                scores = np.array([q[row, head] @ key[head] / np.sqrt(q.shape[-1]) for key in k])
                out[row, head] = reference.softmax(scores) @ v[:, head]
        return out.reshape(len(q), WIDTH)

    y = sum(conditioning)
    y = y / (1 + np.exp(-y))
    visual_vectors = linear("visual/modulation", y).reshape(-1, WIDTH)
    text_vectors = linear("text/modulation", y).reshape(-1, WIDTH)
    q, k, v = heads("visual/attention", modulated(x, *visual_vectors[:2]), norms("visual/attention"))
    text_q, text_k, text_v = heads("text/attention", modulated(text, *text_vectors[:2]), norms("text/attention"))
    if kind.recursive:
        pool = {name.rsplit("/", 1)[1]: value for name, value in weights.items() if name.startswith("recursion/pool/")}
        base = [weights[f"visual/attention/qkv/{name}"] for name in ("kernel", "bias")]
        qkv = reference.recursion(
            modulated(x, *visual_vectors[:2])[None], *(vector[None] for vector in visual_vectors[:2]),
            conditioning[0][None], conditioning[1][None], [pool], base, HEADS, config.recursion,
            steps=config.recursion.latent_steps, gumbel=None, norms=norms("visual/attention"),
            context=(text_k[None], text_v[None]), head=None, forms={},
        ).qkv[0]  # fmt: skip
        q, k, v = np.moveaxis(qkv.reshape(len(x), 3, HEADS, -1), 1, 0)
        for part, own in ((q, 0), (k, 1)) if config.qk_norm else ():
            part[...] = [[reference.rms_norm(h, norms("visual/attention")[own]) for h in row] for row in part]
    keys, values = np.concatenate([k, text_k]), np.concatenate([v, text_v])
    gate, shift_2, scale_2, gate_2 = visual_vectors[2:6]
    start, x = x, x + gate * linear("visual/attention/out", attend(q, keys, values))
    if kind.dual:
        second = heads("dual", modulated(start, *visual_vectors[6:8]), norms("dual"))
        x = x + visual_vectors[8] * linear("dual/out", attend(*second))
    x = x + gate_2 * linear("visual/mlp/down", gelu(linear("visual/mlp/up", modulated(x, shift_2, scale_2))))
    if not kind.last:
        gate, shift_2, scale_2, gate_2 = text_vectors[2:]
        text = text + gate * linear("text/attention/out", attend(text_q, keys, values))
        hidden = gelu(linear("text/mlp/up", modulated(text, shift_2, scale_2)))
        text = text + gate_2 * linear("text/mlp/down", hidden)
    return x, text


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", [
    BlockKind(recursive=True, dual=False, last=False),
    BlockKind(recursive=True, dual=True, last=True),
    BlockKind(recursive=False, dual=True, last=False),
], ids=str)  # fmt: skip
def test_a_block_equals_plain_numpy(kind, qk_norm):
    """Including its recursion over the text's keys and values; masked padding has no effect."""
    config = config_of(qk_norm=qk_norm)
    block = PureModel(lambda key: MMDiTBlock(config, kind, rngs=nnx.Rngs(key)))
    weights = randomized(block)
    rng = np.random.default_rng(3)
    x, text = rng.standard_normal((IMAGES, TOKENS, WIDTH)), rng.standard_normal((IMAGES, TEXT, WIDTH))
    conditioning, lengths = rng.standard_normal((2, IMAGES, WIDTH)), [5, 3, 1]
    out, report = jax.jit(
        lambda weights: block.bind(weights)(
            (jnp.asarray(x, jnp.float32), jnp.asarray(text, jnp.float32)),
            conditioning=Conditioning(*jnp.asarray(conditioning, jnp.float32)),
            text_mask=jnp.asarray([[place < length for place in range(TEXT)] for length in lengths]),
        )
    )(weights)
    assert (report is not None) == kind.recursive
    double = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    for image, length in enumerate(lengths):
        words = text[image, :length]
        expected = reference_block(double, kind, config, x[image], words, conditioning[:, image])
        for ours, theirs in zip((out[0][image], out[1][image, :length]), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * np.abs(theirs).max())


def equations(jaxpr, loops=0):
    """Every equation of a jaxpr, with the number of loops around it."""
    for equation in jaxpr.eqns:
        yield equation, loops
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner, loops + (equation.primitive.name in ("scan", "while")))


@pytest.mark.parametrize("last", [False, True])
def test_latent_steps_compute_nothing_of_the_text(last):
    """The text's projection runs once, outside the loop over latent steps; in it only visual queries attend."""
    kind = BlockKind(recursive=True, dual=False, last=last)
    block = PureModel(lambda key: MMDiTBlock(config_of(), kind, rngs=nnx.Rngs(key)))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((IMAGES, TOKENS, WIDTH), (IMAGES, TEXT, WIDTH))]
    vector = jax.ShapeDtypeStruct((IMAGES, WIDTH), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda weights, tokens, y: block.bind(weights)(tokens, conditioning=Conditioning(y, y)))(
        block.shapes, tuple(arrays), vector
    )
    products = [
        ([variable.aval.shape for variable in equation.invars], loops)
        for equation, loops in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    with_text = [loops for inputs, loops in products if any(TEXT in shape for shape in inputs)]
    projection = [(IMAGES, TEXT, WIDTH), (WIDTH, HEADS, WIDTH // HEADS)]
    projected = [loops for inputs, loops in products if inputs == projection]
    assert projected == [0, 0, 0] and not any(with_text)  # q, k, v
    logits = [  # products of queries and keys, each [B, H, tokens, d]
        (loops, queries[2])
        for (queries, keys), loops in products
        if keys == (IMAGES, HEADS, TOKENS + TEXT, WIDTH // HEADS) and queries[-1] == WIDTH // HEADS
    ]
    assert logits == [(1, TOKENS), (0, TOKENS if last else TOKENS + TEXT)]


def test_recursion_starts_from_the_base_model():
    """While the experts' second map is zero, the model equals its base for any T, at inference and in training."""
    config = config_of(dataclasses.replace(RECURSION, latent_steps=5), dual_attention_blocks=1)
    base_config = dataclasses.replace(config, recursion=RecursionConfig())
    model, base = pure(config), pure(base_config)
    parameters = randomized(model, keep_zero=["experts/up"])
    layers = per_layer(parameters, layout(config))
    base_parameters = from_per_layer(layers, list(base.shapes), layout(base_config))
    assert base_parameters.keys() == base.shapes.keys()
    expected, none = run(base, base_parameters)
    assert none is None and float(jnp.max(jnp.abs(expected))) > 0.1

    at = jax.jit(lambda parameters, steps: model.bind(parameters)(*data(), latent_steps=steps))
    for steps in (1, 2, 5):
        output, reports = at(parameters, steps)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
        assert reports.ran.sum() == 2 * steps
    np.testing.assert_allclose(run(model, parameters, key=jax.random.key(2))[0], expected, rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(at(randomized(model), 5)[0] - expected))) > 1e-3


def test_an_untrained_model_answers_exactly_zero():
    model = pure(config_of())
    output, _ = run(model, model.init(jax.random.key(0)), key=jax.random.key(1))
    chex.assert_trees_all_equal(output, jnp.zeros((IMAGES, SIZE, SIZE, CHANNELS)))


def test_kinds_are_cut_into_segments_and_unrolled_blocks_are_the_same_model():
    scanned = config_of(dataclasses.replace(RECURSION, blocks="1,2"), depth=5, dual_attention_blocks=1)
    assert layout(scanned).segments == ((0, 1), (1, 2), (3, 1), (4, 1))
    assert block_kinds(scanned)[4] == BlockKind(recursive=False, dual=False, last=True)
    unrolled = dataclasses.replace(scanned, scan_blocks=False)
    parameters = randomized(pure(scanned))
    layers = per_layer(parameters, layout(scanned))
    others = from_per_layer(layers, list(pure(unrolled).shapes), layout(unrolled))
    chex.assert_trees_all_close(run(pure(unrolled), others), run(pure(scanned), parameters), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_matters_only_to_a_model_that_does_not_mask_it(masked):
    model = pure(config_of(mask_padding=masked))
    parameters, (images, times, text) = randomized(model), data()
    other = text._replace(states=text.states + 5.0 * ~text.mask[..., None])
    expected, output = (run(model, parameters, (images, times, each))[0] for each in (text, other))
    changed = np.abs(output - expected).max(axis=(1, 2, 3)) > 1e-4
    assert changed.tolist() == [False, not masked, not masked]  # the first text has no padding


def test_all_of_the_text_matters():
    model = pure(config_of())
    parameters, (images, times, text) = randomized(model), data()
    expected, _ = run(model, parameters)
    for other in (text._replace(pooled=text.pooled + 1), text._replace(states=text.states + 1)):
        output, _ = run(model, parameters, (images, times, other))
        assert np.abs(output - expected).max(axis=(1, 2, 3)).min() > 1e-4


def test_every_gradient_is_finite_in_bfloat16():
    model = pure(
        config_of(
            dataclasses.replace(RECURSION, blocks="0,1"),
            depth=2,
            dtype="bfloat16",
            qk_norm=True,
            remat="full",
            dual_attention_blocks=1,
        )
    )

    @jax.jit
    def gradients(parameters):
        return jax.grad(lambda p: jnp.mean(jnp.square(model.bind(p)(*data(), key=jax.random.key(0))[0] - 1.0)))(
            parameters
        )

    found = gradients(randomized(model))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, randomized(model))
    chex.assert_tree_all_finite(found)
    still = {name for name, value in found.items() if not np.any(np.asarray(value))}
    # The last block does not use its text queries.
    assert all("text/attention/query_norm" in name for name in still) and len(still) == 1


def test_positions_are_the_middle_of_one_table():
    whole = cropped_sincos_positions(8, 6, 6, max_size=6, base_size=3).reshape(6, 6, 8)
    crop = cropped_sincos_positions(8, 2, 4, max_size=6, base_size=3).reshape(2, 4, 8)
    chex.assert_trees_all_equal(crop, whole[2:4, 1:5])
    np.testing.assert_allclose(whole[1, 4, :2], np.sin([2.0, 2.0 / 100]), rtol=1e-6)  # column 4 of 6 on 0 .. 3
    np.testing.assert_allclose(whole[1, 4, 4:6], np.sin([0.5, 0.5 / 100]), rtol=1e-6)  # and row 1
    chex.assert_trees_all_equal(cropped_sincos_positions(8, 3, 3, max_size=3, base_size=3), sincos_positions(8, 3, 3))
