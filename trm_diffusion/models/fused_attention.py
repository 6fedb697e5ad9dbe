"""Softmax attention over short sequences as one TPU kernel a pass, which writes no logits.

A program of the kernel holds all queries, keys and values of some heads of one image and takes one head after another:
logits in float32, softmax, and the product with the values, all in the chip's vector memory. The backward pass computes
logits and softmax again, so that q, k and v are all it needs of the forward pass. For one head, with s = d^-1/2:

    P = softmax(s q k^T),  o = P v
    dv = P^T do,  dP = do v^T,  dS = P * (dP - rowsum(P * dP)),  dq = s dS k,  dk = s dS^T q

Heads lie side by side in memory, [B, N, H * d], as projections make them; an axis of d = 72 would be padded to 128. The
kernel turns its block into [H * d, N] first: so heads are rows, to be cut anywhere, and so logits are [M, N], whose
softmax reduces over rows too; both would else go through the unit that moves data between lanes, the slowest here.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

LANES, SUBLANES = 128, 8
VMEM_BYTES = 48 * 2**20  # of vector memory that a program may take; the smallest chip that this is for has 64 MiB
LOGITS = 2**18  # that are computed at a time, in whole heads or in parts of their queries
AHEAD = 2  # logits are computed so many parts before they are needed, which hides the latency of the products
MASKED = -1e30  # a logit; finite, for a query that sees no key
TO_BASE_2 = math.log2(math.e)

_ROWS, _INNER, _LANES = (((0,), (0,)), ((), ())), (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # contracted


def fits(q_bnhd: jax.Array, k_bmhd: jax.Array) -> bool:
    """Whether the kernel can take these shapes."""
    _, n, heads, d = q_bnhd.shape
    m, size = k_bmhd.shape[1], q_bnhd.dtype.itemsize
    blocks = _lanes(heads, d) * size * 3 * (3 * n + 4 * m)  # of the backward pass: moved twice at a time, and turned
    return d % SUBLANES == 0 and blocks + 8 * 4 * max(LOGITS, m * LANES) <= VMEM_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(q_bnhd, k_bmhd, v_bmhd, mask_bm=None, interpret: bool = False) -> jax.Array:
    """As `dot_product_attention`, for shapes that `fits` admits, on a TPU; `interpret` runs the kernels elsewhere.

    On several devices each runs the kernel on its own images and heads; sequences are gathered, if they are divided.
    """
    masks = () if mask_bm is None else (mask_bm,)
    return _partitioned(_forward, bool(masks), interpret)(q_bnhd, k_bmhd, v_bmhd, *masks)


def _saving(q, k, v, mask, interpret):
    return fused_attention(q, k, v, mask, interpret), (q, k, v, mask)


def _gradients(interpret, residuals, do):
    q, k, v, mask = residuals
    masks = () if mask is None else (mask,)
    return *_partitioned(_backward, bool(masks), interpret)(q, k, v, do, *masks), None


fused_attention.defvjp(_saving, _gradients)


@functools.cache
def _partitioned(call, masked: bool, interpret: bool):
    """`call`, of q, k, v, ... [B, N or M, H, d] and perhaps a mask [B, M], on each device's share of B and H."""
    backward = call is _backward

    @custom_partitioning
    def partitioned(*operands):
        return call(*operands, interpret=interpret)

    def partition(mesh, operands, results):
        spec = (*operands[0].sharding.spec, None, None, None)
        share = NamedSharding(mesh, PartitionSpec(spec[0], None, spec[2], None))
        shares = [share if len(x.shape) == 4 else NamedSharding(mesh, PartitionSpec(spec[0])) for x in operands]
        return mesh, partitioned.fun, jax.tree.map(lambda _: share, results), shares

    queries, keys = "b n h d", "b m h d"
    operands = [queries, keys, keys] + [queries] * backward + ["b m"] * masked
    results = [queries, keys, keys] if backward else [queries]
    partitioned.def_partition(
        partition=partition,
        sharding_rule=f"{', '.join(operands)} -> {', '.join(results)}",
        need_replication_factors=("n", "m", "d"),
    )
    return partitioned


def _forward(q, k, v, *masks, interpret: bool):
    return _call(_forward_kernel, 2, (q, k, v), masks, (q,), interpret)[0]


def _backward(q, k, v, do, *masks, interpret: bool):
    return tuple(_call(_backward_kernel, 5, (q, k, v, do), masks, (q, k, v), interpret))


def _call(kernel, products: int, operands, masks, results, interpret: bool):
    """Runs the kernel over images and groups of heads. products: of [N, d] by [d, M] for each head."""
    batch, n, heads, d = operands[0].shape
    m, width, lanes = operands[1].shape[1], heads * d, _lanes(heads, d)

    def rows(x):
        return x.transpose(0, 2, 3, 1).reshape(batch, width, x.shape[1])

    def spec(x):
        return pl.BlockSpec((1, lanes, x.shape[1]), lambda image, group: (image, group, 0))

    inputs = [rows(x) for x in operands] + [mask.astype(jnp.float32)[:, None, :] for mask in masks]
    outputs = [jax.ShapeDtypeStruct((batch, width, x.shape[1]), x.dtype) for x in results]
    out = pl.pallas_call(
        functools.partial(kernel, d=d, masked=bool(masks)),
        grid=(batch, width // lanes),
        in_specs=[spec(x) for x in operands] + [pl.BlockSpec((1, 1, m), lambda image, _: (image, 0, 0)) for _ in masks],
        out_specs=[spec(x) for x in results],
        out_shape=outputs,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * n * m * width,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs + outputs),
            transcendentals=batch * heads * n * m,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(*inputs)
    return [x.reshape(batch, heads, d, -1).transpose(0, 3, 1, 2) for x in out]


def _lanes(heads: int, d: int) -> int:
    """Lanes of the heads that one program takes: the fewest that fill whole registers, or all."""
    fitting = (some for some in range(1, heads) if heads % some == 0 and some * d % LANES == 0)
    return next(fitting, heads) * d


def _forward_kernel(q_ref, k_ref, v_ref, *refs, d: int, masked: bool):
    mask_ref, o_ref = refs if masked else (None, *refs)
    q,k,v,o=(x.at[0] for x in (q_ref,k_ref,v_ref,o_ref))
    mask = _column(mask_ref)

    def finish(head, queries, logits):
        p, total = _softmax(logits)
        o[head, queries] = (_product(v[head], p, _INNER) / total).astype(o.dtype)

    _pipeline(q, d, k.shape[1], functools.partial(_logits, q, k, mask), finish)


def _backward_kernel(q_ref, k_ref, v_ref, do_ref, *refs, d: int, masked: bool):
    mask_ref, (dq_ref, dk_ref, dv_ref) = (refs[0], refs[1:]) if masked else (None, refs)
    q,k,v,do,dq_,dk_,dv_=(x.at[0] for x in (q_ref,k_ref,v_ref,do_ref,dq_ref,dk_ref,dv_ref))
    mask, sums = _column(mask_ref), {}

    def begin(head, queries):
        return _logits(q, k, mask, head, queries), _product(v[head], do[head, queries], _ROWS)

    def finish(head, queries, begun):
        (p, total), dp = _softmax(begun[0]), begun[1]
        p = p / total
        ds = p * (dp - jnp.sum(p * dp, axis=0, keepdims=True)) * d**-0.5
        dv, dk = _product(do[head, queries], p, _LANES), _product(q[head, queries], ds, _LANES)
        dq = _product(k[head], ds, _INNER)
        if queries.start:
            dv, dk = dv + sums["v"], dk + sums["k"]
        sums["v"], sums["k"] = dv, dk
        dq_[head, queries] = dq.astype(q.dtype)
        if queries.stop == q.shape[1]:
            dv_[head], dk_[head] = dv.astype(v.dtype), dk.astype(k.dtype)

    _pipeline(q, d, k.shape[1], begin, finish)


def _pipeline(q, d: int, m: int, begin, finish):
    """begin(head, queries), then finish(head, queries, begun), for all heads and their queries in parts; as slices."""
    width, n = q.shape
    part = min(n, max(LOGITS // m // LANES, 1) * LANES)
    parts = [
        (slice(h, h + d), slice(start, min(start + part, n))) for h in range(0, width, d) for start in range(0, n, part)
    ]
    begun = [begin(*some) for some in parts[:AHEAD]]
    for i, some in enumerate(parts):
        begun += [begin(*next_) for next_ in parts[i + AHEAD : i + AHEAD + 1]]
        finish(*some, begun.pop(0))


def _product(a, b, contracted):
    return jax.lax.dot_general(a, b.astype(a.dtype), contracted, preferred_element_type=jnp.float32)


def _logits(q, k, mask, head, queries):
    """[M, queries] float32, to base 2."""
    logits = _product(k[head], q[head, queries], _ROWS) * ((head.stop - head.start) ** -0.5 * TO_BASE_2)
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _softmax(logits):
    """Numerators [M, queries] and their sums [1, queries], float32."""
    p = jnp.exp2(logits - jnp.max(logits, axis=0, keepdims=True))
    return p, jnp.sum(p, axis=0, keepdims=True)


def _column(mask_ref):
    """[1, 1, M] -> [M, 1] bool."""
    if mask_ref is None:
        return None
    row = jnp.broadcast_to(mask_ref[0], (SUBLANES, mask_ref.shape[2]))
    return row.T[:, :1] > 0
