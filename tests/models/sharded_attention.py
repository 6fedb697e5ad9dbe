"""Checks the attention kernels on eight simulated devices: python -m tests.models.sharded_attention"""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.models.test_attention import fused, operands, reference_attention, splash, value_and_gradients
from trm_diffusion.models.attention import _per_device
from trm_diffusion.runtime.sharding import MESH_AXES, models_over


def check_no_device_needs_another(mesh: Mesh, kernel) -> None:
    """Images and heads are sharded: values and gradients stay where they are, without a collective."""
    heads = NamedSharding(mesh, P(("data", "fsdp", "expert"), None, "tensor"))
    images = NamedSharding(mesh, P(("data", "fsdp", "expert")))
    q, k, v, mask, cotangent = operands(16, 24, heads=4, masked=True, images=4)
    expected = value_and_gradients(reference_attention, q, k, v, mask, cotangent)
    q, k, v, cotangent = jax.device_put((q, k, v, cotangent), heads)
    mask = jax.device_put(mask, images)

    def step(*operands):
        with models_over(mesh):
            return value_and_gradients(functools.partial(_per_device, kernel), *operands)

    step = jax.jit(step).lower(q, k, v, mask, cotangent).compile()
    for a, b in zip(step(q, k, v, mask, cotangent), expected, strict=True):
        assert a.sharding.is_equivalent_to(heads, 4), a.sharding
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert "all-" not in step.as_text() and "collective" not in step.as_text()


def check_axes_that_do_not_divide_are_whole_everywhere(mesh: Mesh) -> None:
    q, k, v, mask, _ = operands(16, 24, heads=3, masked=True, images=3)
    with models_over(mesh):
        found = jax.jit(functools.partial(_per_device, fused))(q, k, v, mask)
    np.testing.assert_allclose(found, reference_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    mesh = jax.make_mesh((1, 2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    for kernel in (fused, splash):
        check_no_device_needs_another(mesh, kernel)
    check_axes_that_do_not_divide_are_whole_everywhere(mesh)
