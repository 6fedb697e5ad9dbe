"""The analytic FLOPs of the recursion benchmark equal those that the compiler counts."""

import pytest

from benchmarks.recursion import base_flops, experiment, extra_flops, lowered_step


def counted_flops(blocks: str, latent_steps: int, **recursion) -> tuple[float, object]:
    """FLOPs of a training step with one block and one expert, so none are wasted; unrolled, as loops count once."""
    built = experiment(
        "S/2", blocks, latent_steps, 8, depth=1, width=256, heads=2, scan_blocks=False, dtype="float32", remat="none",
        recursion={"experts": 1, "scan_latent_steps": False, **recursion},
    )  # fmt: skip
    return lowered_step(built).cost_analysis()["flops"], built


@pytest.fixture(scope="module")
def off():
    return counted_flops("none", 1)


def test_base_flops(off):
    counted, built = off
    assert base_flops(built) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("latent_steps", "scope"), [(1, "shared"), (2, "shared"), (3, "per_projection")])
def test_extra_flops(off, latent_steps, scope):
    without, _ = off
    kept, built = counted_flops("all", latent_steps, routing_scope=scope, remat="none")
    recomputed, _ = counted_flops("all", latent_steps, routing_scope=scope)
    useful, with_recomputation = extra_flops(built)
    assert useful == pytest.approx(kept - without, rel=0.05)
    assert with_recomputation == pytest.approx(recomputed - without, rel=0.05)
