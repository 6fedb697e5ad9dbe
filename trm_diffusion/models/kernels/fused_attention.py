"""Softmax attention over short sequences as one TPU kernel per pass, which writes no logits to memory.

A program of the kernel holds all queries, keys and values of some heads of one image in the chip's vector memory. It
takes one head at a time: float32 logits, softmax, and the product with the values. The backward pass recomputes logits
and softmax, so it needs only q, k and v from the forward pass. For one head, with s = d^-1/2:

    P = softmax(s q k^T),  o = P v
    dv = P^T do,  dP = do v^T,  dS = P * (dP - rowsum(P * dP)),  dq = s dS k,  dk = s dS^T q

The kernel has tokens along the last axis, [B, H, d, N], the layout in which XLA tends to leave a projection; there an
axis of d = 72 would be padded to 128. Logits are [M, N], so that the softmax reduces across registers, not within them.
A kernel declares the cost of its useful products only; the hardware pads d to 128 in those that sum over it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8  # of a vector register
VMEM_BYTES = 48 * 2**20  # vector memory that a program may use; the smallest supported chip has 64 MiB
LOGITS = 2**18  # logits computed at a time: those of a whole head, or of part of its queries
PARTS = 16  # most parts (a head and some of its queries) in a program, which unrolls them
AHEAD = 2  # parts whose logits are computed ahead, so that the products of one overlap with another's softmax
MASKED = -1e30  # a masked logit; finite, so that a query with every key masked gives no NaN
TO_BASE_2 = math.log2(math.e)

_ROWS, _INNER, _LANES = (((0,), (0,)), ((), ())), (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # contracted axes


def fits(q_bnhd: jax.Array, k_bmhd: jax.Array) -> bool:
    """Whether the kernel supports these shapes: N and M up to about 2,048."""
    return _heads_at_a_time(q_bnhd, k_bmhd) > 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(q_bnhd, k_bmhd, v_bmhd, mask_bm=None, interpret: bool = False) -> jax.Array:
    """Like `dot_product_attention`, for shapes that `fits`, on one TPU; `interpret` runs it on other platforms."""
    return _forward(q_bnhd, k_bmhd, v_bmhd, mask_bm, interpret)


def _saving(q, k, v, mask, interpret):
    return fused_attention(q, k, v, mask, interpret), (q, k, v, mask)


def _gradients(interpret, residuals, do):
    q, k, v, mask = residuals
    return *_backward(q, k, v, do, mask, interpret), None


fused_attention.defvjp(_saving, _gradients)


def _forward(q, k, v, mask, interpret: bool):
    return _call(_forward_kernel, 2, (q, k, v), mask, (q,), interpret)[0]


def _backward(q, k, v, do, mask, interpret: bool):
    return _call(_backward_kernel, 5, (q, k, v, do), mask, (q, k, v), interpret)


def _call(kernel, products: int, operands, mask, results, interpret: bool):
    """Runs the kernel over images and groups of heads. products: number of [N, d] by [d, M] products per head."""
    masks = () if mask is None else (mask,)
    batch, n, heads, d = operands[0].shape
    m, group = operands[1].shape[1], _heads_at_a_time(*operands[:2])

    def spec(x):
        return pl.BlockSpec((1, group, d, x.shape[1]), lambda image, group: (image, group, 0, 0))

    inputs = [x.transpose(0, 2, 3, 1) for x in operands] + [mask.astype(jnp.float32)[:, None, :] for mask in masks]
    outputs = [jax.ShapeDtypeStruct((batch, heads, d, x.shape[1]), x.dtype) for x in results]
    out = pl.pallas_call(
        functools.partial(kernel, masked=bool(masks)),
        grid=(batch, heads // group),
        in_specs=[spec(x) for x in operands] + [pl.BlockSpec((1, 1, m), lambda image, _: (image, 0, 0)) for _ in masks],
        out_specs=[spec(x) for x in results],
        out_shape=outputs,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * heads * n * m * d,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs + outputs),
            transcendentals=batch * heads * n * m,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(*inputs)
    return [x.transpose(0, 3, 1, 2) for x in out]


def _queries_at_a_time(n: int, m: int) -> int:
    return min(n, max(LOGITS // m // LANES, 1) * LANES)


def _heads_at_a_time(q_bnhd, k_bmhd) -> int:
    """The most heads that fit in one program, 0 if not even one does."""
    _, n, heads, d = q_bnhd.shape
    m, queries = k_bmhd.shape[1], _queries_at_a_time(n, k_bmhd.shape[1])
    tokens = 3 * pl.cdiv(n, LANES) + 4 * pl.cdiv(m, LANES)  # inputs and outputs of the backward pass
    block = 2 * q_bnhd.dtype.itemsize * d * LANES * tokens  # double-buffered
    logits = 4 * m * pl.cdiv(queries, LANES) * LANES
    most = min(PARTS // pl.cdiv(n, queries), (VMEM_BYTES - 8 * logits) // block)
    return max((some for some in range(1, most + 1) if heads % some == 0), default=0)


def _forward_kernel(q, k, v, *refs, masked: bool):
    mask, o = (_column(refs[0]), refs[1]) if masked else (None, *refs)

    def finish(head, queries, logits):
        p, total = _softmax(logits)
        o[*head, :, queries] = (_product(v[head], p, _INNER) / total).astype(o.dtype)

    _pipeline(q, k, functools.partial(_logits, q, k, mask), finish)


def _backward_kernel(q, k, v, do, *refs, masked: bool):
    mask, (dq, dk, dv) = (_column(refs[0]), refs[1:]) if masked else (None, refs)
    sums = {}  # over the parts of a head's queries

    def begin(head, queries):
        return _logits(q, k, mask, head, queries), _product(v[head], do[*head, :, queries], _ROWS)

    def finish(head, queries, begun):
        logits, dp = begun
        p, total = _softmax(logits)
        p = p / total
        ds = p * (dp - jnp.sum(p * dp, axis=0, keepdims=True)) * q.shape[2] ** -0.5
        dq[*head, :, queries] = _product(k[head], ds, _INNER).astype(dq.dtype)
        for name, x, product in (("k", q, ds), ("v", do, p)):
            part = _product(x[*head, :, queries], product, _LANES)
            sums[name] = sums[name] + part if queries.start else part
        if queries.stop == q.shape[3]:
            dk[head], dv[head] = sums["k"].astype(dk.dtype), sums["v"].astype(dv.dtype)

    _pipeline(q, k, begin, finish)


def _pipeline(q, k, begin, finish):
    """Calls begin(head, queries), and AHEAD parts later finish(head, queries, begun), for every part, as indices."""
    _, heads, _, n = q.shape
    size = _queries_at_a_time(n, k.shape[3])
    queries = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    parts = [((0, head), some) for head in range(heads) for some in queries]
    begun = []
    for i in range(len(parts) + AHEAD):
        if i < len(parts):
            begun.append(begin(*parts[i]))
        if i >= AHEAD:
            finish(*parts[i - AHEAD], begun.pop(0))


def _product(a, b, contracted):
    return jax.lax.dot_general(a, b.astype(a.dtype), contracted, preferred_element_type=jnp.float32)


def _logits(q, k, mask, head, queries):
    """Logits [M, queries] for a softmax to base 2, float32."""
    logits = _product(k[head], q[*head, :, queries], _ROWS) * (q.shape[2] ** -0.5 * TO_BASE_2)
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _softmax(logits):
    """Numerators [M, queries] of the softmax and their sums [1, queries], float32."""
    p = jnp.exp2(logits - jnp.max(logits, axis=0, keepdims=True))
    return p, jnp.sum(p, axis=0, keepdims=True)


def _column(mask_ref):
    """[1, 1, M] -> [M, 1] bool."""
    if mask_ref is None:
        return None
    row = jnp.broadcast_to(mask_ref[0], (SUBLANES, mask_ref.shape[2]))
    return row.T[:, :1] > 0
