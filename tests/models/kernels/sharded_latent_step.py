"""Checks the latent step's kernels on four simulated devices: python -m tests.models.kernels.sharded_latent_step"""

import jax
import numpy as np
from jax.sharding import AxisType

from tests.models.kernels.test_fused_latent_step import INTERPRETED, fused_by_pool, operands, plain
from trm_diffusion.models.kernels import fused_latent_step
from trm_diffusion.runtime.sharding import MESH_AXES, models_over


def main() -> None:
    vars(fused_latent_step).update(INTERPRETED)
    arguments, cotangents = operands(4, 128, 1)
    mesh = jax.make_mesh((1, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def step(*arguments):
        with models_over(mesh):
            return fused_by_pool(*arguments)

    expected, pullback = jax.vjp(plain, *arguments)
    found, backward = jax.vjp(jax.jit(step), *arguments)
    for a, b in zip((*found, *backward(cotangents)), (*expected, *pullback(cotangents)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * np.abs(b).max())


if __name__ == "__main__":
    main()
