"""A DiT's training step written by hand: functions on a dictionary of arrays, and nothing to configure.

benchmarks/train_step.py uses it to measure our step's overhead. It computes the same as our step for a DiT without
recursion, in float32, with rectified flow, AdamW and one EMA, from the same parameters and random draws. It does not
log, skip, clip, accumulate or shard.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trm_diffusion.models.embed import patchify, sincos_positions, sinusoid, unpatchify
from trm_diffusion.runtime.random import Purpose, key_for

BLOCKS = "stack/segments/0/blocks/"


class State(NamedTuple):
    step: jax.Array
    parameters: dict[str, jax.Array]
    first: dict[str, jax.Array]
    second: dict[str, jax.Array]
    average: dict[str, jax.Array]


def initial_state(parameters: dict[str, jax.Array]) -> State:
    """A state with copies of the parameters, since the step donates its state."""
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    copies = [jax.tree.map(jnp.copy, tree) for tree in (parameters, zeros, zeros, parameters)]
    return State(jnp.zeros((), jnp.int32), *copies)


def norm(x):
    mean, square = jnp.mean(x, -1, keepdims=True), jnp.mean(x * x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(square - mean * mean + 1e-6)


def linear(p, name, x):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def block(x, p, c, heads):
    b, n, d = x.shape
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(linear(p, "modulation", c)[:, None], 6, -1)
    qkv = linear(p, "attention/qkv", norm(x) * (1 + scale_1) + shift_1).reshape(b, n, 3, heads, d // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / (d // heads) ** 0.5, -1)
    attended = jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, d)
    x = x + gate_1 * linear(p, "attention/out", attended)
    hidden = jax.nn.gelu(linear(p, "mlp/up", norm(x) * (1 + scale_2) + shift_2))
    return x + gate_2 * linear(p, "mlp/down", hidden)


def forward(p, images, times, labels, *, patch, heads):
    """[B, S, S, C], times [B] in 0..1000, labels [B] -> [B, S, S, C]."""
    size, width = images.shape[1], p["patch_embed/bias"].shape[0]
    x = linear(p, "patch_embed", patchify(images, patch)) + sincos_positions(width, size // patch, size // patch)[None]
    t = jax.nn.silu(linear(p, "timestep_embed/first", sinusoid(times, 256)))
    c = jax.nn.silu(linear(p, "timestep_embed/second", t) + p["label_embed/table/embedding"][labels])
    layers = {name.removeprefix(BLOCKS): value for name, value in p.items() if name.startswith(BLOCKS)}
    x, _ = jax.lax.scan(lambda x, layer: (block(x, layer, c, heads), None), x, layers)
    shift, scale = jnp.split(linear(p, "final/modulation", c)[:, None], 2, -1)
    return unpatchify(linear(p, "final/out", norm(x) * (1 + scale) + shift), patch, size, size)


def loss(p, images, labels, key, *, patch, heads, null_label, dropout):
    time_key, noise_key, drop_key, *_ = jax.random.split(key, 5)
    t = jax.nn.sigmoid(jax.random.normal(time_key, labels.shape))
    noise = jax.random.normal(noise_key, images.shape)
    labels = jnp.where(jax.random.bernoulli(drop_key, dropout, labels.shape), null_label, labels)
    mixed = t[:, None, None, None]
    velocity = forward(p, (1 - mixed) * images + mixed * noise, 1000 * t, labels, patch=patch, heads=heads)
    return jnp.mean((velocity - (noise - images)) ** 2)


def make_train_step(*, patch, heads, null_label, dropout=0.1, seed=0, lr=1e-4, b1=0.9, b2=0.999, decay=0.9999):
    """(state, images, labels) -> (state, loss), jitted, with the state donated."""

    def step(state, images, labels):
        key = jax.random.fold_in(key_for(seed, Purpose.TRAINING, state.step), 0)
        options = dict(patch=patch, heads=heads, null_label=null_label, dropout=dropout)
        value, gradients = jax.value_and_grad(loss)(state.parameters, images, labels, key, **options)
        n = state.step + 1.0
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradients)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, gradients)
        parameters = jax.tree.map(
            lambda p, m, v: p - lr * (m / (1 - b1**n)) / (jnp.sqrt(v / (1 - b2**n)) + 1e-8),
            state.parameters,
            first,
            second,
        )
        kept = jnp.minimum(decay, n / (n + 9))
        average = jax.tree.map(lambda a, p: a + (1 - kept) * (p - a), state.average, parameters)
        return State(state.step + 1, parameters, first, second, average), value

    return jax.jit(step, donate_argnums=0)
