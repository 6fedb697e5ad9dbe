"""The cost of compiled programs: loops counted in full, bytes sent by kind, device groups in every notation."""

import jax
import jax.numpy as jnp
import pytest

from trm_diffusion.analysis.hlo import first_group, largest_arrays, program_cost

LENGTH, ROWS, WIDTH = 5, 8, 16
PRODUCT = 2 * ROWS * WIDTH * WIDTH


def cost_of(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return program_cost(compiled.as_text())


def test_loops_count_as_often_as_they_run():
    def looped(x, kernels):
        def outer(x, kernel):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ kernel), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, kernels)[0]

    def unrolled(x, kernels):
        for kernel in kernels:
            for _ in range(3):
                x = jnp.tanh(x @ kernel)
        return x

    shapes = (ROWS, WIDTH), (LENGTH, WIDTH, WIDTH)
    costs = [cost_of(function, *shapes) for function in (looped, unrolled)]
    assert [cost.flops for cost in costs] == [LENGTH * 3 * PRODUCT] * 2
    assert [cost.unknown_loops for cost in costs] == [0, 0]
    read = 4 * LENGTH * WIDTH * WIDTH  # the kernels, which each inner iteration reads at least once
    assert all(3 * read < cost.bytes < 12 * read for cost in costs)


def test_a_loop_of_unknown_length_is_told():
    def function(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ kernel, x)

    cost = cost_of(function, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert (cost.flops, cost.unknown_loops) == (PRODUCT, 1)


def test_a_choice_counts_its_dearest_branch():
    def function(x, kernel):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ kernel, lambda x: jnp.tanh(x @ kernel) @ kernel, x)

    assert cost_of(function, (ROWS, WIDTH), (WIDTH, WIDTH)).flops == 2 * PRODUCT


@pytest.mark.parametrize(("attributes", "group"), [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [0, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", [0, 1, 4, 5]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}, dimensions={0}", [0, 1]),
    ("replica_groups=mesh['a'=2,'c'=2], device_ids=(3,1,2,0) {'c'}", [3, 1]),
    ("source_target_pairs={{0,0},{1,2},{2,1}}", [1, 2]),
    ("replica_groups={}, to_apply=%sum", [0]),
])  # fmt: skip
def test_groups_of_devices(attributes, group):
    assert first_group(attributes) == group


def test_groups_in_an_unknown_form_are_not_taken_for_single_devices():
    with pytest.raises(ValueError, match="unknown notation: .*torus"):
        first_group("replica_groups=torus[4,2], dimensions={0}")


# As the TPU compiler writes it: a loop whose trip count is only in its condition; a fusion with an all-reduce of which
# each device keeps its part; a collective in two halves; one between slices; a batched product as a convolution.
TPU_TEXT = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter (whole: bf16[64,32]) -> bf16[16,32] {
  %whole = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[] constant(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%whole), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %part = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %at, %at), dynamic_slice_sizes={16,32}
}

%body (state: (s32[], bf16[64,32], bf16[16,32])) -> (s32[], bf16[64,32], bf16[16,32]) {
  %state = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %whole.1 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %kept = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%whole.1), kind=kCustom, calls=%all-reduce-scatter
  %gather = (bf16[16,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%kept), replica_groups=[2,4]<=[8], dimensions={0}
  %gathered = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather-done(%gather)
  %token = token[] after-all()
  %send = (bf16[16,32]{1,0}, u32[], token[]) send(%kept, %token), channel_id=1, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[16,32]{1,0}, u32[], token[]) recv(%token), channel_id=2, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %received = (bf16[16,32]{1,0}, token[]) recv-done(%recv)
  %everyone = bf16[16,32]{1,0} get-tuple-element(%received), index=0
  %squared = bf16[64,32]{1,0} multiply(%gathered, %gathered), backend_config={"estimated_cycles":"100"}
  ROOT %next = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[16,32]{1,0}) tuple(%counter, %squared, %everyone)
}

%condition (state: (s32[], bf16[64,32], bf16[16,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[16,32]{1,0}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter.1, %limit), direction=LT
}

ENTRY %main (x: bf16[64,32], y: bf16[16,32], q: bf16[6,40,64], k: bf16[6,64,40]) -> bf16[6,40,40] {
  %x = bf16[64,32]{1,0} parameter(0)
  %y = bf16[16,32]{1,0} parameter(1)
  %q = bf16[6,40,64]{2,1,0} parameter(2)
  %k = bf16[6,64,40]{2,1,0} parameter(3)
  %zero = s32[]{:T(128)} constant(2)
  %start = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[16,32]{1,0}) tuple(%zero, %x, %y)
  %loop = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[16,32]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %products = bf16[6,40,40]{2,1,0} convolution(%q, %k), window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501  lines of a program


def test_the_text_of_a_tpus_compiler():
    cost = program_cost(TPU_TEXT, slices=2)
    part = 2 * 16 * 32  # bytes that each device keeps
    turns = 10  # from 2 to 12
    assert cost.collectives == {
        "reduce-scatter": {"count": turns, "bytes": turns * 4 * part * 3 / 4},
        "all-gather": {"count": turns, "bytes": turns * part * 3},
        "all-reduce between slices": {"count": turns, "bytes": turns * 2 * part * 1 / 2},
    }
    assert cost.flops == 6 * 2 * 40 * 64 * 40
    assert (cost.cycles, cost.unknown_loops) == (turns * 100, 0)
    assert largest_arrays(TPU_TEXT, 1)[0]["array"] == "bf16[6, 40, 40]"
