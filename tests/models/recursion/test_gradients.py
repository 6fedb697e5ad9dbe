"""Gradients of the recursion against central differences of the plain float64 reference.

The selection is piecewise constant, and the gradient of the straight-through weight is by design not that of its value.
So the forward weight is soft here; test_gate.py shows that both forms have the same gradient. Every array is moved
along random directions, and its gradient must give the slope.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.recursion.small import SMALL, as_reference, build, inputs, run, run_reference

EPSILON, DIRECTIONS = 1e-6, 2
CASES = {  # name: training, joint, fields of the config
    "dense": (True, False, dict(dispatch="dense")),
    "capacity": (True, True, dict(dispatch="capacity", capacity_factor=0.8)),
    "one_hot": (True, True, dict(dispatch="one_hot", capacity_factor=0.8, routing_scope="per_projection")),
    "inference": (False, True, dict(pool="per_latent_step", residual="after_norm", base_input="carry")),
    "base_every_step": (True, False, dict(base_every_step=True, halting="convergence", halting_epsilon=0.6)),
    "step_embedding": (True, True, dict(step_embedding=True)),
    "accumulate": (True, False, dict(state="accumulate", base_every_step=True)),
    "gated": (True, False, dict(state="gated", truncated_latent_steps=1)),
    "expert_mlp": (True, True, dict(expert_mlp=True, truncated_latent_steps=1)),
    "norms": (True, True, dict(attention_qk_norm=True, attended_norm=True)),
    "blend": (True, True, dict(base_input="blend", base_every_step=True, base_projections="q,k")),
    "blends": (True, False, dict(base_input="blend", base_step_input="blend", base_every_step=True)),
    "learned_halting": (True, True, dict(halting="learned", experts=2, base_input="carry")),
    "truncated": (True, False, dict(truncated_latent_steps=1, base_input="carry")),
    "truncated_convergence": (True, True, dict(truncated_latent_steps=1, halting="convergence", halting_epsilon=0.6)),
    "truncated_learned": (True, True, dict(truncated_latent_steps=1, halting="learned", experts=2)),
    "all_truncated_learned": (True, False, dict(truncated_latent_steps=9, halting="learned", base_input="carry")),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_slopes_of_the_reference(name):
    training, joint, fields = CASES[name]
    config = dataclasses.replace(SMALL, **dict(latent_steps=3, experts=3, experts_per_token=2) | fields)
    config = dataclasses.replace(config, forward_weight="soft")
    graphdef, state = build(config, qk_norm=name == "capacity")
    key, data, rng = jax.random.key(4) if training else None, inputs(images=2), np.random.default_rng(5)
    cotangent = rng.standard_normal((*data[0].shape[:2], 3, data[0].shape[2]))
    weight = 1.0 if config.halting == "learned" else 0.0  # of the divergence

    def loss(state, data):
        qkv, report = run(graphdef, state, data, joint=joint, steps=3, key=key)
        return jnp.sum(qkv * cotangent.astype(np.float32)) + weight * report.halting_divergence[-1]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, data)
    gradients, treedef = jax.tree.flatten(as_reference(graphdef, *gradients, joint=joint))
    unmoved = as_reference(graphdef, state, data, joint=joint)
    arguments, fixed = jax.tree.leaves(unmoved), None
    if config.truncated_latent_steps:
        constants = run_reference(unmoved, config, steps=3, key=key).trajectory[: config.truncated_latent_steps]
        fixed = unmoved["x"], constants

    def loss_along(index, direction, distance):
        moved = [leaf + distance * direction if i == index else leaf for i, leaf in enumerate(arguments)]
        result = run_reference(jax.tree.unflatten(treedef, moved), config, steps=3, key=key, fixed=fixed)
        return np.sum(result.qkv * cotangent) + weight * result.divergence

    assert len(gradients) > 10
    for index, gradient in enumerate(gradients):
        for _ in range(DIRECTIONS):
            direction = rng.standard_normal(gradient.shape)
            ahead, behind = (loss_along(index, direction, sign * EPSILON) for sign in (1, -1))
            scale = 1e-2 + np.linalg.norm(gradient)
            np.testing.assert_allclose(
                np.sum(gradient * direction), (ahead - behind) / (2 * EPSILON), atol=1e-4 * scale
            )
