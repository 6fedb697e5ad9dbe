"""The DiT as a whole: published sizes, dtypes, the zero start, and that recursion starts from the base model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trm_diffusion.models.dit import DiT, DiTConfig, block_kinds, dit_size
from trm_diffusion.models.recursion.config import RecursionConfig
from trm_diffusion.models.remat import POLICIES
from trm_diffusion.models.stack import StackLayout, from_per_layer, per_layer
from trm_diffusion.models.transformer import layout_of
from trm_diffusion.runtime.parameters import PureModel, count

TINY = dict(depth=3, width=16, heads=2, patch=2, dtype="float32")
RECURSION = dict(blocks="1,2", rank=3, routing_group=2, remat="none")
CLASSES, SIZE, IN, OUT = 5, 4, 2, 4


def pure(config: DiTConfig, *, size=SIZE, channels=IN, out=OUT, classes=CLASSES) -> PureModel:
    return PureModel(
        lambda key: DiT(
            config, image_size=size, in_channels=channels, out_channels=out, num_classes=classes, rngs=nnx.Rngs(key)
        )
    )


def stack_layout(config: DiTConfig) -> StackLayout:
    return layout_of(config, block_kinds(config))


def tiny(recursion: dict | None = RECURSION, **fields) -> DiTConfig:
    return DiTConfig(**TINY | fields, recursion=RecursionConfig(**recursion or {}))


def randomized(model: PureModel, *, keep_zero=(), seed=0) -> dict:
    """Random parameters, so that no zero hides anything; names that end in one of `keep_zero` stay zero."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.zeros(shape.shape)
        if name.endswith(tuple(keep_zero))
        else jnp.asarray(0.3 * rng.standard_normal(shape.shape), jnp.float32)
        for name, shape in model.shapes.items()
    }


def data(batch=4, seed=1):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.standard_normal((batch, SIZE, SIZE, IN)), jnp.float32)
    return images, jnp.linspace(1.0, 999.0, batch), jnp.arange(batch) % (CLASSES + 1)


def run(model: PureModel, parameters: dict, **options):
    return model.bind(parameters)(*data(), **options)


def published_count(depth, width, patch) -> int:
    """Parameters of a DiT on 32 x 32 x 4 latents with learned variance and 1,000 classes, added up by hand."""
    d, pixels = width, patch**2
    block = (6 * d * d + 6 * d) + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    embeddings = (pixels * 4 * d + d) + (256 * d + d + d * d + d) + 1001 * d
    final = (2 * d * d + 2 * d) + (d * pixels * 8 + pixels * 8)
    return depth * block + embeddings + final


@pytest.mark.parametrize(("name", "millions"), [
    ("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675), ("XL/8", 676), ("B/4", 130),
])  # fmt: skip
def test_published_sizes(name, millions):
    """DiT, table 4 and appendix A; the fixed position table, a buffer of the published model, is not a parameter."""
    size = dit_size(name)
    model = pure(DiTConfig(**size), size=32, channels=4, out=8, classes=1000)
    total = count(model.shapes)
    assert total == published_count(size["depth"], size["width"], size["patch"])
    assert abs(total / 1e6 - millions) < 1
    if name == "XL/2":
        assert total == 675_129_632 - 256 * 1152 == 674_834_720


@pytest.mark.parametrize("name", ["XL", "XXL/2", "S/3", "s/2", "", "S/2/2"])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(ValueError, match="is not one of S, B, L, XL with patch 2, 4 or 8"):
        dit_size(name)


@pytest.mark.parametrize(("blocks", "number"), [("middle", 1), ("0,2", 2), ("all", 3)])
def test_recursion_adds_what_its_docstring_says_for_each_block(blocks, number):
    recursion = RECURSION | dict(blocks=blocks, experts=5, rank=7, routing_scope="per_projection")
    added = count(pure(tiny(recursion)).shapes) - count(pure(tiny(None)).shapes)
    width = TINY["width"]
    assert added == number * (6 * 5 * 7 * width + 2 * 3 * 5 * width)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_output_are_float32_whatever_the_computation(dtype):
    model = pure(tiny(dtype=dtype))
    assert {shape.dtype for shape in model.shapes.values()} == {jnp.dtype("float32")}
    output, reports = run(model, randomized(model), key=jax.random.key(0))
    chex.assert_shape(output, (4, SIZE, SIZE, OUT))
    chex.assert_type(output, jnp.float32)
    chex.assert_type(jax.tree.leaves(reports), jnp.float32)
    chex.assert_tree_all_finite((output, reports))
    chex.assert_shape(reports.load, (2, 2, 1, 2))  # [R, T, P, M]


def test_the_computation_is_in_the_configs_dtype():
    """With the same weights, bfloat16 agrees with float32 to bfloat16's precision, but not to float32's."""
    (single, _), (half, _) = (run(pure(tiny(dtype=d)), randomized(pure(tiny()))) for d in ("float32", "bfloat16"))
    error = float(jnp.max(jnp.abs(single - half)) / jnp.max(jnp.abs(single)))
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize("recursion", [None, RECURSION], ids=["base", "recursive"])
def test_an_untrained_model_answers_exactly_zero(recursion):
    """adaLN-Zero: every gate and the final layer start at zero, whatever the input."""
    model = pure(tiny(recursion))
    output, _ = run(model, model.init(jax.random.key(0)), key=jax.random.key(1))
    chex.assert_trees_all_equal(output, jnp.zeros_like(output))


def test_an_untrained_block_is_the_identity():
    model = pure(tiny())
    dit = model.bind(model.init(jax.random.key(0)))
    embedded = {}

    def spy(x, **_):
        embedded["out"] = x
        return jnp.zeros((*x.shape[:2], 4 * OUT))

    final, dit.final = dit.final, lambda x, _: spy(x)
    dit(*data())
    after = embedded["out"]
    dit.stack = lambda x, **_: (x, None)
    dit(*data())
    chex.assert_trees_all_equal(after, embedded["out"])
    del final


FORMS = {  # variants of the recursion that must equal the base model while the experts' second map is zero
    "one_latent_step": dict(latent_steps=1),
    "two_of_five_experts": dict(latent_steps=5, experts=5, experts_per_token=2, dispatch="one_hot"),
    "after_norm": dict(residual="after_norm", modulation=False, routing_scope="per_projection", dispatch="capacity"),
    "pools": dict(pool="per_latent_step", forward_weight="soft", gate_inputs="tokens", dispatch="dense"),
    "base_every_step": dict(latent_steps=3, base_every_step=True, gate_inputs="timestep,condition"),
    "convergence": dict(latent_steps=3, base_every_step=True, halting="convergence", halting_epsilon=0.5),
    "learned": dict(latent_steps=3, experts=1, halting="learned"),
    "figure_1": dict(base_input="carry", residual="after_norm"),  # in self-attention: a_{T-1} is zero
}


@functools.cache
def base_answer(training: bool):
    """The base model's output with the weights, layer by layer, that `randomized` gives a recursive model."""
    config = tiny(None)
    model, layers = pure(config), per_layer(randomized(pure(tiny()), keep_zero=["experts/up"]), stack_layout(tiny()))
    parameters = from_per_layer(layers, list(model.shapes), stack_layout(config))
    assert parameters.keys() == model.shapes.keys()
    key = jax.random.key(2) if training else None
    output, reports = jax.jit(lambda parameters: run(model, parameters, key=key))(parameters)
    assert reports is None and float(jnp.max(jnp.abs(output))) > 0.1
    return output


def recursive_answers(fields: dict, training: bool):
    """A recursive model's outputs with the base's weights: with the experts' second map zero, and random."""
    config = tiny(RECURSION | fields)
    model, at_start = pure(config), randomized(pure(tiny()), keep_zero=["experts/up"])
    base = per_layer(at_start, stack_layout(tiny()))
    own = per_layer(randomized(model), stack_layout(config))
    layers = {name: own[name] if "/recursion/" in name else base[name] for name in own}
    at_work = from_per_layer(layers, list(model.shapes), stack_layout(config))
    zeroed = {name: 0 * leaf if name.endswith("experts/up") else leaf for name, leaf in at_work.items()}
    key = jax.random.key(2) if training else None
    answer = jax.jit(lambda parameters: run(model, parameters, key=key)[0])
    return answer(zeroed), answer(at_work)


@pytest.mark.parametrize(
    ("form", "training"),
    [(form, True) for form in FORMS] + [(form, False) for form in ("two_of_five_experts", "convergence", "learned")],
)
def test_recursion_starts_from_the_base_model(form, training):
    zeroed, at_work = recursive_answers(FORMS[form], training)
    expected = base_answer(training)
    np.testing.assert_allclose(zeroed, expected, rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(at_work - expected))) > 1e-3


@pytest.mark.parametrize("latent_steps", [1, 2])
def test_the_carry_form_does_not_start_from_the_base_model(latent_steps):
    """The base projection sees a_{T-1} + x~, which is 2 x~ where the experts add nothing."""
    fields = dict(base_input="carry", latent_steps=latent_steps)
    zeroed, _ = recursive_answers(fields, training=False)
    assert float(jnp.max(jnp.abs(zeroed - base_answer(False)))) > 1e-2


def test_qk_norm_bounds_the_logits():
    """Queries and keys are normalised, so that scaling their projections by 1,000 changes nothing."""
    config = tiny(qk_norm=True)
    model = pure(config)
    parameters = randomized(model)
    assert {name.rsplit("/", 2)[1] for name in parameters if name.endswith("scale")} == {"query_norm", "key_norm"}
    expected, _ = run(model, parameters)
    width = config.width

    def scaled(name, value):  # W_q and W_k times 1,000, and their biases
        return value * jnp.where(jnp.arange(3 * width) < 2 * width, 1e3, 1.0) if "/qkv/" in name else value

    base = {name: value for name, value in parameters.items() if not name.endswith("experts/up")}
    base = base | {name: jnp.zeros_like(parameters[name]) for name in parameters if name.endswith("experts/up")}
    plain, _ = run(model, base)
    with jax.numpy_rank_promotion("allow"):
        loud = {name: scaled(name, value) for name, value in base.items()}
    chex.assert_trees_all_close(run(model, loud)[0], plain, rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(expected - plain))) > 1e-3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_gradient_is_finite_in_bfloat16(qk_norm):
    model = pure(tiny(dtype="bfloat16", qk_norm=qk_norm, remat="full"))

    @jax.jit
    def gradients(parameters):
        return jax.grad(lambda p: jnp.mean(jnp.square(run(model, p, key=jax.random.key(0))[0] - 1.0)))(parameters)

    fresh = model.init(jax.random.key(0))
    for parameters in (fresh, randomized(model), jax.tree.map(lambda leaf: 3 * leaf, randomized(model))):
        found = gradients(parameters)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, fresh)
        chex.assert_tree_all_finite(found)
    assert all(np.any(np.asarray(leaf)) for leaf in gradients(randomized(model)).values())


def test_remat_computes_again_what_it_says_and_changes_no_gradient():
    """A block's products are the modulation, q, k, v, logits, values, output, and the MLP's two."""
    depth, again = 2, {"none": 0, "dots": 2, "selective": 5, "full": 9}
    jaxprs, gradients = {}, {}
    for remat in POLICIES:
        model = pure(tiny(None, depth=depth, remat=remat, scan_blocks=False))
        parameters = randomized(model)
        loss = jax.grad(lambda p, model=model: jnp.mean(jnp.square(run(model, p)[0] - 1.0)))
        jaxprs[remat] = str(jax.make_jaxpr(loss)(parameters)).count("dot_general")
        gradients[remat] = jax.jit(loss)(parameters)
        chex.assert_trees_all_close(gradients[remat], gradients["none"], rtol=1e-4, atol=1e-5)
    assert {remat: (found - jaxprs["none"]) / depth for remat, found in jaxprs.items()} == again


def test_times_and_labels_matter():
    model = pure(tiny())
    parameters = randomized(model)
    images, times, labels = data()
    bound = model.bind(parameters)
    expected, _ = bound(images, times, labels)
    assert float(jnp.min(jnp.max(jnp.abs(bound(images, times + 5, labels)[0] - expected), axis=(1, 2, 3)))) > 1e-4
    assert float(jnp.min(jnp.max(jnp.abs(bound(images, times, labels + 1)[0] - expected), axis=(1, 2, 3)))) > 1e-4


@pytest.mark.parametrize("scan_blocks", [True, False])
def test_scanned_and_unrolled_jitted_and_not_are_one_model(scan_blocks):
    """A tiny config of everything also runs without jit, for use with a debugger."""
    scanned, config = tiny(), tiny(scan_blocks=scan_blocks)
    parameters = randomized(pure(scanned))
    model, layers = pure(config), per_layer(parameters, stack_layout(scanned))
    parameters = from_per_layer(layers, list(model.shapes), stack_layout(config))
    key = jax.random.key(3)
    expected = jax.jit(lambda p: run(pure(scanned), p, key=key))(randomized(pure(scanned)))
    with jax.disable_jit():
        output = run(model, parameters, key=key)
    chex.assert_trees_all_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_longer_recursion_than_it_was_built_for():
    """One pool and gate serve every latent step, so any T can be used at inference."""
    model = pure(tiny())
    parameters = randomized(model)
    outputs = [run(model, parameters, latent_steps=steps) for steps in (2, 4)]
    chex.assert_shape(outputs[1][1].load, (2, 4, 1, 2))
    assert float(jnp.max(jnp.abs(outputs[0][0] - outputs[1][0]))) > 1e-4


@pytest.mark.parametrize("halting", ["none", "convergence", "learned"])
def test_an_image_at_inference_depends_on_no_other(halting):
    """Bitwise equal whatever the batch's other images are, even if they recurse for longer; order does not matter."""
    fields = dict(experts=3, latent_steps=4, halting=halting, halting_epsilon=0.2, routing_group=4)
    model = pure(tiny(RECURSION | fields))
    parameters = randomized(model)
    forward = jax.jit(lambda *data: model.bind(parameters)(*data))
    images, times, labels = data()
    expected, reports = forward(images, times, labels)
    assert halting == "none" or np.any((reports.running > 0) & (reports.running < 1))
    other, _ = forward(images.at[1:].add(2.0), times.at[1:].multiply(0.5), labels.at[1:].set(0))
    np.testing.assert_array_equal(other[0], expected[0])
    assert np.all(np.any(other[1:] != expected[1:], axis=(1, 2, 3)))
    order = np.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(forward(images[order], times[order], labels[order])[0], expected[order], rtol=1e-6)
