"""Prints the collectives of a product with a sharded kernel as JSON: python -m tests.runtime.gathered_product.

Needs libtpu. It is the first product of DiT-XL/2's MLP, for 8 images on each of 32 chips, with sharded parameters.
"""

import json

import jax
import jax.numpy as jnp

from trm_diffusion.analysis.hlo import program_cost
from trm_diffusion.runtime.devices import compiler_options
from trm_diffusion.runtime.sharding import MeshConfig, batch_sharding, make_mesh, parameter_sharding
from trm_diffusion.runtime.topology import described_devices, parse_topology


def main() -> None:
    mesh = make_mesh(MeshConfig(fsdp=32), devices=described_devices(parse_topology("v5p:2x4x4")))
    x = jax.ShapeDtypeStruct((256, 256, 1152), jnp.bfloat16, sharding=batch_sharding(mesh))
    kernel_sharding = parameter_sharding(mesh, "kernel", ("embed", "mlp"))
    kernel = jax.ShapeDtypeStruct((1152, 4608), jnp.float32, sharding=kernel_sharding)
    product = jax.jit(
        lambda x, kernel: x @ kernel.astype(x.dtype),
        out_shardings=batch_sharding(mesh),
        compiler_options=compiler_options(mesh),
    )
    print(json.dumps(program_cost(product.lower(x, kernel).compile().as_text()).collectives))


if __name__ == "__main__":
    main()
