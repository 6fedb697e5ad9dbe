"""Prints the costs of two programs on eight simulated devices as JSON: python -m tests.jobs.eight_devices"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.jobs.tiny import tiny_config
from trm_diffusion.analysis.hlo import program_cost
from trm_diffusion.jobs import compile_ahead
from trm_diffusion.runtime.topology import parse_topology


def collectives() -> dict:
    """The collectives of a loop that has one of each kind."""

    def all_kinds(x):
        def turn(x, _):
            x = jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])
            x = jax.lax.psum_scatter(2 * jax.lax.all_gather(x, "b", tiled=True), "b", tiled=True)
            x = jax.lax.all_to_all(x * x, "b", 1, 0, tiled=True).reshape(x.shape)
            return 0.1 * jax.lax.psum(x, "a"), None

        return jax.lax.scan(turn, x, None, length=3)[0]

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.jit(jax.shard_map(all_kinds, mesh=mesh, in_specs=P("b"), out_specs=P("b"), check_vma=False))
    return program_cost(sharded.lower(jnp.zeros((64, 8))).compile().as_text()).collectives


def training_step() -> dict:
    config = dict(model__depth=3, model__width=64, model__recursion__blocks="none", train__batch_size=16, mesh__fsdp=-1)
    compile_ahead.described_devices = lambda topology: jax.devices()
    return compile_ahead.report_on(tiny_config(**config), parse_topology("v5p:2x2x2"), "train")


if __name__ == "__main__":
    print(json.dumps({"kinds": collectives(), "report": training_step()}))
