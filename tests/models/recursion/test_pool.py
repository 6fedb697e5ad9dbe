"""When the pool uses its kernels, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.models.recursion.small import HEADS, SMALL, WIDTH, build, inputs, pretend_tpu, run
from trm_diffusion.models.recursion import Recursion, RecursionConfig
from trm_diffusion.models.recursion.pool import KERNELS_HONOUR, kernels_honour

OTHERS = {  # values other than the default, where the type does not give one, or dense dispatch must be cheapest
    "blocks": "all",
    "experts": 1,
    "rank": 64,
    "alpha": 16.0,
    "experts_per_token": 2,
    "gate_inputs": "tokens",
    "forward_weight": "soft",
    "base_input": "carry",
    "base_step_input": "blend",
    "base_projections": "q,k",
    "residual": "after_norm",
    "state": "gated",
    "pool": "per_latent_step",
    "routing_scope": "per_projection",
    "dispatch": "dense",
    "remat": "none",
    "halting": "convergence",
    "halting_prior": 0.5,
}


def other_value(field: dataclasses.Field):
    if field.name in OTHERS:
        return OTHERS[field.name]
    return not field.default if isinstance(field.default, bool) else 2 * field.default or 1


def shapes_only(a_bnd, shift_bd, scale_bd, *weights):
    """Replaces both kernels: zeros in the shapes of their results."""
    if len(weights) == 1:
        return jnp.zeros((*a_bnd.shape[:2], weights[0].shape[1])), a_bnd
    return 3 * (jnp.zeros_like(a_bnd),)


def takes_kernels(config: RecursionConfig, monkeypatch, *, training: bool) -> bool:
    """Whether a recursion traced for a TPU calls the kernels."""
    kernels = dict.fromkeys(("fused_token_logits", "fused_updates"), shapes_only)
    calls = pretend_tpu(monkeypatch, tokens=1, kernels=kernels)
    graphdef, state = build(config)
    key = jax.random.key(0) if training else None
    jax.eval_shape(lambda state: run(graphdef, state, inputs(images=8), steps=None, key=key), state)
    assert set(calls) in (set(), set(kernels))
    return bool(calls)


@pytest.mark.parametrize("field", dataclasses.fields(RecursionConfig), ids=lambda field: field.name)
@pytest.mark.parametrize("training", [False, True])
def test_a_field_leaves_the_kernels_unless_it_is_listed(field, training, monkeypatch):
    value = other_value(field)
    assert value != field.default
    config = dataclasses.replace(RecursionConfig(), **{field.name: value})
    assert takes_kernels(config, monkeypatch, training=training) == (field.name in KERNELS_HONOUR)


def test_what_the_kernels_do_not_honour():
    names = {field.name for field in dataclasses.fields(RecursionConfig)}
    assert KERNELS_HONOUR < names
    assert names - KERNELS_HONOUR >= {"normalization", "modulation", "residual", "dispatch"}


def test_the_papers_form_takes_the_kernels_and_a_gate_that_sees_no_tokens_does_not(monkeypatch):
    assert takes_kernels(RecursionConfig(), monkeypatch, training=True)
    without_tokens = RecursionConfig(gate_inputs="timestep,condition")
    assert not takes_kernels(without_tokens, monkeypatch, training=True)


def test_a_field_that_nobody_listed_leaves_the_kernels(monkeypatch):
    """A switch of tomorrow: at its default the kernels run, at another value they do not."""

    @dataclasses.dataclass(frozen=True)
    class Extended(RecursionConfig):
        new_switch: bool = False
        new_list: list = dataclasses.field(default_factory=list)

    assert not kernels_honour(Extended())  # a default that cannot be compared
    extended = dataclasses.make_dataclass(
        "Extended", [("new_switch", bool, False)], bases=(RecursionConfig,), frozen=True
    )
    assert takes_kernels(extended(), monkeypatch, training=True)
    assert not takes_kernels(extended(new_switch=True), monkeypatch, training=True)


@pytest.mark.parametrize("images, group", [(4, 3), (6, 4), (2, 3), (4, 2)])
def test_a_batch_that_routing_groups_do_not_divide_is_refused_in_training(images, group):
    graphdef, state = build(dataclasses.replace(SMALL, routing_group=group))
    data = inputs(images=images)
    run(graphdef, state, data, steps=1)  # inference has no groups
    if images % min(group, images) == 0:
        run(graphdef, state, data, steps=1, key=jax.random.key(0))
        return
    with pytest.raises(ValueError, match=f"batch of {images} images .* groups of {group}$"):
        run(graphdef, state, data, steps=1, key=jax.random.key(0))


def test_the_pool_of_a_recursion_is_its_own():
    """Parameters lie where checkpoints have them."""
    shared = nnx.eval_shape(lambda: Recursion(WIDTH, HEADS, SMALL, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    paths = ["/".join(path) for path, _ in nnx.to_flat_state(nnx.state(shared))]
    names = ("experts/down", "experts/up", "gate/condition_kernel", "gate/token_kernel")
    assert paths == [f"pool/{name}" for name in names]
