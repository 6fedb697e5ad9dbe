"""Gates and experts trained on a frozen base: the initial state, what changes, and what can be exported."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.jobs.tiny import tiny_config
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.jobs.convert_weights import convert, weights_of
from trm_diffusion.jobs.sample import draw_all, make_sample_fn
from trm_diffusion.jobs.train import train
from trm_diffusion.jobs.train_step import loss_and_metrics
from trm_diffusion.models.architecture import stack_layout
from trm_diffusion.models.stack import from_per_layer, per_layer
from trm_diffusion.run.restore import layers_of_run, load_run, model_of, sampling_parameters, state_from_pretrained
from trm_diffusion.runtime.parameters import memory
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.weights.adapters import base_sha256, check_adapter, merged
from trm_diffusion.weights.store import load_weights, save_weights

DIGITS = dict(data__source="digits", log__every=1, sample__guidance=1.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with `base`, trained without recursion; `tuned`, gates and experts trained on it; and `adapter`."""
    directory = epath.Path(tmp_path_factory.mktemp("finetune"))
    train(tiny_config(**DIGITS, model__recursion__blocks="none", train__updates=4), directory / "base", StopRequest())
    train(tuned_config(directory), directory / "tuned", StopRequest())
    convert(str(directory / "tuned"), str(directory / "adapter"), to_layout="adapter")
    return directory


def tuned_config(directory, **overrides):
    start = dict(init__workdir=str(directory / "base"), init__missing="*/recursion/*", train__trainable="recursion")
    return tiny_config(**DIGITS | start | dict(train__updates=4, optim__warmup_steps=0) | overrides)


def batch(size=8):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((size, 8, 8, 1)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 10, size), jnp.int32)


def test_the_loss_starts_exactly_at_the_bases(runs):
    tuned = build(tuned_config(runs))
    base, base_state = load_run(tiny_config(**DIGITS, model__recursion__blocks="none", train__updates=4), runs / "base")

    def loss(experiment, parameters):
        return jax.jit(lambda p: loss_and_metrics(experiment, p, *batch(), jax.random.key(7))[0])(parameters)

    expected = loss(base, sampling_parameters(base, base_state))
    assert loss(tuned, state_from_pretrained(tuned).parameters) == expected
    layers = layers_of_run(runs / "tuned")
    assert any(np.any(value) for name, value in layers.items() if name.endswith("experts/up"))  # it has trained


def test_the_bases_bytes_are_unchanged(runs):
    assert base_sha256(layers_of_run(runs / "tuned")) == base_sha256(layers_of_run(runs / "base"))
    assert load_weights(runs / "adapter").record["base_sha256"] == base_sha256(layers_of_run(runs / "base"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_trained_alone(runs, dtype):
    experiment = build(tuned_config(runs, train__frozen_dtype=dtype))
    state = experiment.abstract_state
    assert memory(state.optimizer) == 2 * memory(state.trainable) + 2 * 4  # two moments, two counters
    assert memory(state.ema) == memory(state.trainable)
    assert {leaf.dtype for leaf in state.frozen.values()} == {jnp.dtype(dtype)}
    assert all("/recursion/" in name for name in state.trainable)
    # No array of a frozen parameter's size leaves the differentiated part, except the parameter itself.
    grad = jax.grad(lambda t, f: loss_and_metrics(experiment, {**t, **f}, *batch(), jax.random.key(0))[0])
    gradients = jax.eval_shape(grad, state.trainable, state.frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, jax.tree.map(lambda leaf: leaf, state.trainable))


def test_an_adapter_on_its_base_draws_the_same_samples_to_the_bit(runs, tmp_path):
    manifest = json.loads((runs / "adapter/manifest.json").read_text())
    assert manifest["kind"] == "adapter" and manifest["model"]["recursion"]["rank"] == 4
    assert manifest["parameters"] == 6 * 2 * 4 * 16 + 2 * 2 * 16  # 6 M r D + 2 M D
    # Without the run that made it: added to the base as a directory of weights.
    convert(str(runs / "base"), str(tmp_path / "base"))
    onto = dict(init__missing="", init__adapter=str(runs / "adapter"), train__trainable="all")
    pictures = []
    for config, workdir in (
        (tuned_config(runs), runs / "tuned"),
        (tuned_config(tmp_path, **onto), tmp_path / "new"),
    ):
        experiment, state = load_run(config, epath.Path(workdir))
        labels = np.arange(8, dtype=np.int32)
        drawn = draw_all(make_sample_fn(experiment), config, sampling_parameters(experiment, state), labels)
        pictures.append(np.concatenate(list(drawn)))
    np.testing.assert_array_equal(pictures[1], pictures[0])


def test_an_adapter_elsewhere_is_refused(runs, tmp_path):
    adapter = dict(init__missing="", init__adapter=str(runs / "adapter"))
    with pytest.raises(UserError, match="has config.model.recursion.latent_steps 2, not 3"):
        state_from_pretrained(build(tuned_config(runs, **adapter, model__recursion__latent_steps=3)))
    with pytest.raises(UserError, match="was trained on other weights than .*tuned"):
        state_from_pretrained(
            build(tuned_config(runs, **adapter | {"init__workdir": write_other_base(runs, tmp_path)}))
        )
    with pytest.raises(UserError, match="has no gates and experts to export"):
        convert(str(runs / "base"), str(tmp_path / "none"), to_layout="adapter")
    convert(str(runs / "base"), str(tmp_path / "base"))
    with pytest.raises(UserError, match="holds a dit, not gates and experts"):
        state_from_pretrained(build(tuned_config(runs, **adapter | {"init__adapter": str(tmp_path / "base")})))


def test_an_adapter_that_is_older_than_a_field_has_its_default(runs):
    adapter, model = load_weights(runs / "adapter"), model_of(tuned_config(runs))
    del adapter.model["recursion"]["step_embedding"]
    check_adapter(adapter, model, "adapter")
    model["recursion"] |= {"step_embedding": True}
    with pytest.raises(UserError, match="has config.model.recursion.step_embedding False, not True"):
        check_adapter(adapter, model, "adapter")


def write_other_base(runs, directory):
    """Writes the base with one number changed, as a directory of weights."""
    convert(str(runs / "base"), str(directory / "copy"))
    weights = load_weights(directory / "copy")

    def read(name):
        value = np.array(weights.read(name))
        if name == "patch_embed/bias":
            value[0] += 1e-3
        return value

    save_weights(directory / "tuned", dataclasses.replace(weights, read=read))
    return str(directory / "tuned")


LORA = dict(latent_steps=1, experts=1, normalization=False, modulation=False)


@pytest.mark.parametrize("changed, message", [
    ({}, ""),
    ({"pool": "per_latent_step"}, ""),
    ({"latent_steps": 2}, "latent_steps 2: only a plain LoRA can"),
    ({"experts": 2}, "experts 2: only"),
    ({"normalization": True, "modulation": True}, "normalization True, modulation True: only"),
])  # fmt: skip
def test_merge_where_it_is_exact_and_a_refusal_elsewhere(changed, message):
    config = tiny_config(**{f"model__recursion__{name}": value for name, value in (LORA | changed).items()})
    experiment, rng = build(config), np.random.default_rng(0)
    shapes = experiment.model.shapes
    parameters = {name: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    weights = weights_of(config, per_layer(parameters, stack_layout(config.model)), "run")
    if message:
        with pytest.raises(UserError, match=message):
            merged(weights, "run")
        return
    base = build(tiny_config(model__recursion__blocks="none"))
    layers = dict(merged(weights, "run").tensors())
    plain = from_per_layer(layers, list(base.model.shapes), stack_layout(base.config.model))
    images, labels = batch()

    def output(experiment, parameters):
        bound = experiment.model.bind(parameters)
        return jax.jit(lambda images, labels: bound(images, 100.0 * labels, labels)[0])(images, labels)

    expected = output(experiment, parameters)
    np.testing.assert_allclose(output(base, plain), expected, rtol=1e-4, atol=1e-4)
    zero = {name: np.zeros_like(leaf) if name.endswith("experts/up") else leaf for name, leaf in parameters.items()}
    assert jnp.abs(output(experiment, zero) - expected).max() > 0.01  # the experts have an effect


def test_experts_that_are_still_zero_can_be_dropped():
    config = tiny_config()
    layers = per_layer(build(config).init_state().parameters, stack_layout(config.model))
    dropped = merged(weights_of(config, layers, "run"), "run")
    assert dropped.specs.keys() == {name for name in layers if "/recursion/" not in name}
