"""A recursion and its block's attention, small enough for the plain reference, and functions that run both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.recursion import reference
from trm_diffusion.models.attention import Attention, Context
from trm_diffusion.models.kernels import fused_latent_step
from trm_diffusion.models.recursion import Conditioning, Recursion, RecursionConfig, pool

IMAGES, TOKENS, WIDTH, HEADS, TEXT = 4, 3, 8, 2, 5
SMALL = RecursionConfig(blocks="all", rank=3, routing_group=2, capacity_factor=1.0, remat="none")


def build(config: RecursionConfig, *, qk_norm=False, dtype=jnp.float32):
    """(graphdef, state) of an attention and its recursion. All weights are random: zeros could hide an error."""

    def modules():
        rngs = nnx.Rngs(0)
        attention = Attention(WIDTH, HEADS, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        return attention, Recursion(WIDTH, HEADS, config, dtype=dtype, rngs=rngs)

    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(modules))
    values = {path: jnp.asarray(0.5 * rng.standard_normal(v.shape, np.float32)) for path, v in nnx.to_flat_state(state)}
    return graphdef, nnx.from_flat_state(values)


def with_zero_up(state):
    """The state with B, the experts' second map, zero as before training."""
    flat = dict(nnx.to_flat_state(state))
    return nnx.from_flat_state({path: 0 * v if path[-1] == "up" else v for path, v in flat.items()})


def inputs(seed=1, images=IMAGES):
    """x~ [B, N, D], its block's shift and scale [B, D], the conditioning, and keys and values of a text."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((images, *shape), np.float32))

    x, shift, scale = normal(TOKENS, WIDTH), 0.3 * normal(WIDTH), 0.3 * normal(WIDTH)
    conditioning = Conditioning(normal(WIDTH), normal(WIDTH))
    return x, shift, scale, conditioning, tuple(normal(TEXT, HEADS, WIDTH // HEADS) for _ in range(2))


def run(graphdef, state, data, *, steps, joint=False, key=None, observe=False):
    """The q, k, v that the block's own attention would see, [B, N, 3, D], and the report."""
    attention, recursion = nnx.merge(graphdef, state)
    x, shift, scale, conditioning, context = data
    out = recursion(
        x,
        shift_bd=shift,
        scale_bd=scale,
        conditioning=conditioning,
        attention=attention,
        context=Context(*context) if joint else None,
        latent_steps=steps,
        key=key,
        observe=observe,
    )
    return out.qkv.reshape(*x.shape[:2], 3, WIDTH), out.report


def as_reference(graphdef, state, data, *, joint) -> dict:
    """Weights and inputs as the arguments of the plain reference, float64."""
    attention, recursion = nnx.merge(graphdef, state)
    config = recursion.config
    pool = {
        path[-1]: np.asarray(v, np.float64) for path, v in nnx.to_flat_state(nnx.as_pure(nnx.state(recursion.pool)))
    }
    pools = [pool]
    if config.pool == "per_latent_step":
        pools = [{name: leaf[t] for name, leaf in pool.items()} for t in range(config.latent_steps)]
    x, shift, scale, conditioning, context = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), data)

    def float64(*variables):
        return [np.asarray(v[...], np.float64) for v in variables]

    norms, head = None, None
    if attention.query_norm is not None:
        norms = float64(attention.query_norm.scale, attention.key_norm.scale)
    if config.halting == "learned":
        kernel, bias = float64(recursion.halting.head.kernel, recursion.halting.head.bias)
        head = [kernel[:, 0], bias[0]]

    def parameters(module):
        """{last name of the path: array}, float64."""
        return {path[-1]: np.asarray(v, np.float64) for path, v in nnx.to_flat_state(nnx.as_pure(nnx.state(module)))}

    forms = parameters(recursion.forms)
    if config.expert_mlp:
        forms["expert_mlp"] = parameters(recursion.expert_mlp)
    return dict(
        x=x, shift=shift, scale=scale, timestep=conditioning.timestep, condition=conditioning.condition, pools=pools,
        base=float64(attention.qkv.kernel, attention.qkv.bias), norms=norms, head=head,
        context=context if joint else None, forms=forms,
    )  # fmt: skip


def run_reference(arguments: dict, config: RecursionConfig, *, steps, key=None, fixed=None) -> reference.Result:
    """The plain reference, given the noise that `key` gives the gate."""
    gumbel = mlp_gumbel = None
    if key is not None:
        images, tokens, _ = arguments["x"].shape
        shape = (images, tokens, 3 if config.routing_scope == "per_projection" else 1, config.experts)
        keys = [jax.random.fold_in(key, t) for t in range(steps)]
        gumbel = [np.asarray(jax.random.gumbel(one, shape), np.float64) for one in keys]
        shape, keys = (*shape[:2], 1, shape[3]), [jax.random.fold_in(one, 1) for one in keys]
        mlp_gumbel = [np.asarray(jax.random.gumbel(one, shape), np.float64) for one in keys]
    options = dict(steps=steps, gumbel=gumbel, mlp_gumbel=mlp_gumbel, fixed=fixed)
    return reference.recursion(**arguments, heads=HEADS, config=config, **options)


INTERPRETED = {  # by the names that the pool uses
    function.__name__: functools.partial(function, interpret=True)
    for function in (fused_latent_step.fused_token_logits, fused_latent_step.fused_updates)
}


def pretend_tpu(monkeypatch, *, tokens: int, kernels=INTERPRETED) -> list[str]:
    """Makes the pool run as if on a TPU whose kernels fit every size. Returns a list of the kernels called, by name.

    tokens: how many tokens of an image one program of a kernel takes.
    """
    calls = []

    def noted(name, *operands):
        calls.append(name)
        return kernels[name](*operands)

    monkeypatch.setattr(pool, "platform", lambda: "tpu")
    monkeypatch.setattr(fused_latent_step, "fits", lambda *sizes: True)
    monkeypatch.setattr(fused_latent_step, "TOKENS", (tokens,))
    for name in kernels:
        monkeypatch.setattr(fused_latent_step, name, functools.partial(noted, name))
    return calls
