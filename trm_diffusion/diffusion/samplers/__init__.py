"""The samplers by name, and the scan that runs them, for any network and any objective.

A network is network(noisy [B, ..., C], times [B] in the objective's unit) -> (output, aux). It is traced once for any
number of diffusion steps. A sample depends only on its own noise and key, never on the rest of its batch.
"""

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trm_diffusion.diffusion.objective import Objective
from trm_diffusion.diffusion.samplers.base import Sampler

SAMPLERS = {  # `sample.sampler`: its class
    "ddpm": "trm_diffusion.diffusion.samplers.ddpm:Ancestral",
    "ddim": "trm_diffusion.diffusion.samplers.ddim:DDIM",
    "euler": "trm_diffusion.diffusion.samplers.euler:Euler",
    "heun": "trm_diffusion.diffusion.samplers.heun:Heun",
    "ab2": "trm_diffusion.diffusion.samplers.ab2:AB2",
}


def sampler_class(name: str) -> type[Sampler]:
    return pkgutil.resolve_name(SAMPLERS[name])


def check_sampler(sampler: str, objective_name: str, eta: float = 0.0):
    """Raises ValueError, in one line, for an unknown sampler, or one that does not support the objective or eta."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if objective_name not in sampler_class(sampler).objectives:
        *others, last = (name for name in SAMPLERS if objective_name in sampler_class(name).objectives)
        raise ValueError(
            f"sampler {sampler!r} cannot be used with objective {objective_name!r}; "
            f"choose {', '.join(others)} or {last}"
        )
    if not 0.0 <= eta <= 1.0 or (eta != 0.0 and not sampler_class(sampler).takes_eta):
        takers = " and ".join(name for name in SAMPLERS if sampler_class(name).takes_eta)
        raise ValueError(f"eta is {eta} with sampler {sampler!r}; it is only for {takers}, between 0 and 1")


def draw_initial_noise(keys: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Pure noise [B, *shape] for keys [B]; `shape` is that of one sample."""
    return _normal(keys, 0, shape, dtype)  # network evaluation i folds in i + 1


def _normal(keys: jax.Array, fold: int | jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal noise [B, *shape], row b only from keys[b]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, fold), shape, dtype))(keys)


def sample(
    network: Callable,
    objective: Objective,
    initial_noise: jax.Array,
    keys: jax.Array,
    *,
    sampler: str,
    diffusion_steps: int,
    eta: float = 0.0,
) -> tuple[jax.Array, Any]:
    """Samples from pure noise; returns (samples [B, ..., C], aux with a leading axis [diffusion_steps]).

    initial_noise [B, ..., C] is from `draw_initial_noise`; keys [B] has one PRNG key per sample, for samplers that add
    noise. The state is float32, or float64 for float64 noise. To jit, close over everything but the arrays. If a
    sampler evaluates the network several times per diffusion step, aux is that of the first evaluation.
    """
    check_sampler(sampler, objective.name, eta)
    dtype = jnp.promote_types(initial_noise.dtype, jnp.float32)
    grid = jnp.asarray(objective.time_grid(diffusion_steps), dtype)  # [n + 1]
    chosen = sampler_class(sampler)(objective, grid, eta)
    return run(chosen, network, initial_noise.astype(dtype), keys)


def run(sampler: Sampler, network: Callable, noise: jax.Array, keys: jax.Array) -> tuple[jax.Array, Any]:
    """`sample` with a sampler that has its objective and grid; noise [B, ..., C] has the dtype of the grid."""

    def evaluation(carry, inputs):
        index, row = inputs
        noisy, times = sampler.evaluation_point(carry, row)
        output, aux = network(noisy, times)
        prediction = sampler.objective.predict(output, noisy, times)
        draw_noise = functools.partial(_normal, keys, index + 1, noise.shape[1:], noise.dtype)
        return sampler.step(carry, row, prediction, draw_noise), aux

    rows = sampler.evaluations()
    indices = jnp.arange(len(jax.tree.leaves(rows)[0]))
    carry, aux = jax.lax.scan(evaluation, sampler.init(noise), (indices, rows))
    first_of_step = slice(None, None, sampler.evaluations_per_step)
    return sampler.result(carry), jax.tree.map(lambda leaf: leaf[first_of_step], aux)
