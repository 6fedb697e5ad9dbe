"""The yardstick that other papers give: whole blocks, with all their weights, run T times, one loop after another.

The blocks before the loop and those after it run once (pre, loop, post), as in Looped-DiT (arXiv 2609.40305) and ELT
(arXiv 2604.09168). No block has experts. T loops over n blocks cost as many FLOPs as T n blocks without a loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion import depth
from trm_diffusion.models.recursion.config import RecursionConfig, recursive_blocks


def looped_blocks(config: RecursionConfig, blocks: int) -> tuple[int, int]:
    """(first, end) of the blocks in the loop, of a model with so many blocks; (0, 0) without one.

    Raises ValueError, in one line, unless they follow one another.
    """
    indices = recursive_blocks(config.blocks, blocks)
    if not (config.looped and indices):
        return 0, 0
    first, end = indices[0], indices[-1] + 1
    if len(indices) != end - first:
        raise ValueError(f'"{config.blocks}" has gaps; the blocks of a loop (looped) follow one another')
    return first, end


def repeated(run: Callable, x, latent_steps: int | jax.Array | None, config: RecursionConfig):
    """x after T turns of `run`, x -> x, arrays in a tree. latent_steps: as in `Recursion.__call__`."""
    steps = depth.checked(latent_steps, config)
    unroll = not config.scan_latent_steps
    if isinstance(steps, int):
        return jax.lax.scan(lambda x, _: (run(x), None), x, length=steps, unroll=unroll)[0]

    def turn(x, t):
        return jax.lax.cond(t < steps, run, lambda x: x, x), None

    x, _ = jax.lax.scan(turn, x, jnp.arange(config.latent_steps, dtype=jnp.int32), unroll=unroll)
    return jax.tree.map(lambda leaf: jnp.where(depth.in_range(steps, config), leaf, jnp.nan), x)
