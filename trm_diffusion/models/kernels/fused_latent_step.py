"""A latent step's token logits and low-rank updates as TPU kernels that never write the modulated state to memory.

Both start from the state a and compute h = Mod(LN(a)) = LN(a) (1 + scale) + shift in the chip's vector memory:

    fused_token_logits  W_x LN(h), the tokens' part of the gate's logits, in float32
    fused_updates       sum_m w_m B_m A_m h for q, k and v; every expert runs on every token and is weighted in the
                        r-wide middle, which takes M / k times the products that the routing needs

As separate operations these are small products between passes over a, h and their gradients, and the passes take the
time. The backward kernels recompute h; that of the updates reuses A h from the forward kernel.

States are [B, N, D], as in the rest of a block. Updates have tokens along the last axis, [B, D, N], as
fused_attention.py needs them. A program holds some tokens of one image. Weight gradients are summed over the programs
of each half of the images, since a chip may have two cores. A kernel declares the cost of its products only; they need
no padding if r is a multiple of 128.

The kernels have run in Pallas's interpreter and have been compiled for TPUs; they have not run on one yet.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from trm_diffusion.models.kernels.fused_attention import LANES, SUBLANES, VMEM_BYTES
from trm_diffusion.models.layers import moments

PROJECTIONS = 3  # q, k and v
TOKENS = (256, 128)  # tokens of a program: the first number that divides an image's tokens and fits
HIGHEST = jax.lax.Precision.HIGHEST

_ROWS, _INNER, _LANES = (((0,), (0,)), ((), ())), (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # contracted axes


def fits(tokens: int, width: int, experts: int, rank: int, dtype) -> bool:
    """Whether the kernels support N tokens of D features and M experts of rank r; dtype must be bfloat16."""
    whole = rank % LANES == 0 and width % LANES == 0 and dtype == jnp.bfloat16
    return whole and _tokens_at_a_time(tokens, width, experts * rank, dtype) > 0


def _tokens_at_a_time(tokens: int, width: int, ranks: int, dtype) -> int:
    item = jnp.dtype(dtype).itemsize
    weights = 2 * PROJECTIONS * ranks * width * (item + 2 * 4)  # and their float32 gradients, double-buffered
    for some in TOKENS:
        # Backward kernel: a, its gradient and three cotangents, double-buffered; six float32; A h, its gradient.
        block = width * some * (5 * 2 * item + 6 * 4) + PROJECTIONS * ranks * some * (2 * item + 2 * 4)
        if tokens % some == 0 and weights + block <= VMEM_BYTES:
            return some
    return 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_token_logits(a_bnd, shift_bd, scale_bd, kernel_dc, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """LN(Mod(LN(a))) times the kernel [D, C] -> [B, N, C] float32, and a itself.

    Use the returned a from here on, and the backward kernel adds that use's gradient in the same pass. `interpret` runs
    the kernels on other platforms than TPU.
    """
    return _saving_logits(a_bnd, shift_bd, scale_bd, kernel_dc, interpret)[0]


def _saving_logits(a_bnd, shift_bd, scale_bd, kernel_dc, interpret):
    operands = *_block_operands(a_bnd, shift_bd, scale_bd), ("weights", kernel_dc.T)
    (logits,) = _call(
        _logits_kernel, operands, [("token", (kernel_dc.shape[1],), jnp.float32)], kernel_dc.size, interpret
    )
    return (_tokens_last(logits), a_bnd), (a_bnd, shift_bd, scale_bd, kernel_dc)


def _logits_gradients(interpret, saved, cotangents):
    a_bnd, shift_bd, scale_bd, kernel_dc = saved
    (width, choices), (dlogits, da) = kernel_dc.shape, cotangents
    operands = *_block_operands(a_bnd, shift_bd, scale_bd), ("weights", kernel_dc.T)
    operands += ("token", _tokens_last(dlogits)), ("state", da)
    results = [("state", (width,), a_bnd.dtype), *_modulation_gradients(width), ("all", (choices, width), jnp.float32)]
    da, dshift, dscale, dkernel = _call(
        _logits_gradients_kernel,
        operands,
        results,
        3 * kernel_dc.size,
        interpret,
    )
    dkernel = jnp.sum(dkernel, axis=0).T
    dkernel = dkernel - jnp.mean(dkernel, axis=0, keepdims=True)  # since the kernel was centred
    return _gradients(da, dshift, dscale, shift_bd, scale_bd) + (dkernel,)


fused_token_logits.defvjp(_saving_logits, _logits_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def fused_updates(a_bnd, shift_bd, scale_bd, weights_bnpm, down_pmrd, up_pmrd, interpret: bool = False) -> tuple:
    """Updates of q, k and v from h = Mod(LN(a)), three of [B, N, D]: sum over m of weights * up_m^T (down_m h).

    weights: [B, N, P, M] float32, zero for experts that do not take the token; P = 1 if q, k and v share one choice.
    down, up: [3, M, r, D]. `interpret` runs the kernels on other platforms than TPU.
    """
    return _saving_updates(a_bnd, shift_bd, scale_bd, weights_bnpm, down_pmrd, up_pmrd, interpret)[0]


def _saving_updates(*operands):
    *arrays, interpret = operands
    a_bnd, down_pmrd, up_pmrd = arrays[0], *arrays[4:]
    ranks, width = math.prod(up_pmrd.shape[:-1]), up_pmrd.shape[-1]
    results = [("token", (width,), a_bnd.dtype)] * PROJECTIONS + [("token", (ranks,), a_bnd.dtype)]
    kernel = functools.partial(_updates_kernel, rank=down_pmrd.shape[2])
    *updates, low = _call(kernel, _updates_operands(*arrays), results, 2 * down_pmrd.size, interpret)
    return tuple(map(_tokens_last, updates)), (*arrays, low)


def _updates_gradients(interpret, saved, cotangents):
    *arrays, low = saved
    a_bnd, shift_bd, scale_bd, weights_bnpm, down_pmrd, up_pmrd = arrays
    operands = _updates_operands(*arrays)
    results = [("state", a_bnd.shape[2:], a_bnd.dtype), *_modulation_gradients(a_bnd.shape[2])]
    results += [("token", (math.prod(weights_bnpm.shape[2:]),), jnp.float32)]
    results += [("all", x.shape, jnp.float32) for _, x in operands[4:]]
    operands += ("token", low), *(("token", _tokens_last(x)) for x in cotangents)
    kernel = functools.partial(_updates_gradients_kernel, rank=down_pmrd.shape[2])
    da, dshift, dscale, dweights, *of_weights = _call(kernel, operands, results, 4 * down_pmrd.size, interpret)
    dweights = _tokens_last(dweights).reshape(weights_bnpm.shape)
    of_weights = [
        jnp.sum(x, axis=0).reshape(of.shape).astype(of.dtype)
        for x, of in zip(of_weights, (down_pmrd, up_pmrd), strict=True)
    ]
    return _gradients(da, dshift, dscale, shift_bd, scale_bd) + (dweights, *of_weights)


def _updates_operands(a_bnd, shift_bd, scale_bd, weights_bnpm, down_pmrd, up_pmrd) -> tuple:
    weights = _tokens_last(weights_bnpm.reshape(*weights_bnpm.shape[:2], -1))
    flat = (("weights", x.reshape(-1, x.shape[-1])) for x in (down_pmrd, up_pmrd))
    return *_block_operands(a_bnd, shift_bd, scale_bd), ("token", weights), *flat


fused_updates.defvjp(_saving_updates, _updates_gradients)


def _tokens_last(x_bnd: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, D, N], and back."""
    return x_bnd.swapaxes(1, 2)


def _block_operands(a_bnd, shift_bd, scale_bd) -> tuple:
    """The operands that all kernels share."""
    return ("state", a_bnd), ("image", shift_bd[:, None, :]), ("image", scale_bd[:, None, :])


def _modulation_gradients(width: int) -> list:
    return 2 * [("image", (1, width), jnp.float32)]


def _gradients(da, dshift, dscale, shift_bd, scale_bd) -> tuple:
    return da, dshift[:, 0].astype(shift_bd.dtype), dscale[:, 0].astype(scale_bd.dtype)


def _call(kernel, operands: Sequence[tuple], results: Sequence[tuple], products: int, interpret: bool) -> list:
    """Runs the kernel over halves of the batch, their images, and parts of an image's tokens.

    operands: (kind, array) each, the state a first. results: (kind, further axes, dtype) each. Kinds: "state" is
    [B, N, D]; "token" is [B, ..., N]; "image" is [B, 1, D], as a result summed over the image's tokens; "weights" has
    two axes; "all", only a result, is [halves, ...], summed over each half. products: multiply-adds per token.
    """
    kinds, operands = zip(*operands, strict=True)
    batch, n, width = operands[0].shape
    ranks = max(x.shape[0] for of, x in zip(kinds, operands, strict=True) if of == "weights") // PROJECTIONS
    tokens, halves = _tokens_at_a_time(n, width, ranks, operands[0].dtype), 1 + (batch % 2 == 0)
    images = batch // halves

    def spec(shape, of):
        if of == "weights":
            return pl.BlockSpec(shape, lambda half, image, part: (0, 0))
        if of == "all":
            return pl.BlockSpec((1, *shape[1:]), lambda half, image, part: (half, 0, 0))
        if of == "image":
            return pl.BlockSpec((1, *shape[1:]), lambda half, image, part: (half * images + image, 0, 0))
        if of == "state":
            return pl.BlockSpec((1, tokens, width), lambda half, image, part: (half * images + image, part, 0))
        return pl.BlockSpec((1, shape[1], tokens), lambda half, image, part: (half * images + image, 0, part))

    shapes = {"state": lambda axes: (batch, n, *axes), "token": lambda axes: (batch, *axes, n)}
    shapes |= {"image": lambda axes: (batch, *axes), "all": lambda axes: (halves, *axes)}
    outputs = [jax.ShapeDtypeStruct(shapes[of](axes), dtype) for of, axes, dtype in results]
    return pl.pallas_call(
        kernel,
        grid=(halves, images, n // tokens),
        in_specs=[spec(x.shape, of) for of, x in zip(kinds, operands, strict=True)],
        out_specs=[spec(x.shape, of) for x, (of, *_) in zip(outputs, results, strict=True)],
        out_shape=outputs,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * n,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *outputs)),
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
    )(*operands)


def _logits_kernel(a, shift, scale, kernel, logits):
    product, _, _, inverse = _projected(_modulated(a, shift, scale)[0], kernel)
    logits[0] = product * _as_row(inverse)


def _logits_gradients_kernel(a, shift, scale, kernel, dlogits, da_in, da, dshift, dscale, dkernel):
    h, normal, inverse = _modulated(a, shift, scale)
    product, centred, mean, inverse_h = _projected(h, kernel)
    dproduct = dlogits[0] * _as_row(inverse_h)
    dinverse = _as_column(jnp.sum(dlogits[0] * product, axis=0, keepdims=True))
    # inverse = variance^(-1/2), and the derivative of the variance by h is 2 (h - mean h) / D.
    dh = _float32_product(dproduct, centred, _ROWS) - dinverse * inverse_h**3 * (h - mean) / h.shape[1]
    _add(dkernel, _float32_product(dproduct, h, _INNER), _first_of_half())
    _pull_back(dh, normal, inverse, scale, da, dshift, dscale, da_in[0].astype(jnp.float32))


def _updates_kernel(a, shift, scale, weights, down, up, q, k, v, low, *, rank):
    h = _modulated(a, shift, scale)[0].astype(a.dtype)
    for p, update in enumerate((q, k, v)):
        rows = _rows_of(p, down)
        a_h = _product(down[rows], h, _LANES)  # [M r, N]
        low[0, rows] = a_h.astype(low.dtype)
        weighted = a_h * _over_ranks(weights, p, rank, rows)
        update[0] = _product(up[rows], weighted.astype(a.dtype), _ROWS).astype(update.dtype)


def _updates_gradients_kernel(
    a, shift, scale, weights, down, up, low, dq, dk, dv, da, dshift, dscale, dweights, ddown, dup, *, rank
):
    h32, normal, inverse = _modulated(a, shift, scale)
    h, first = h32.astype(a.dtype), _first_of_half()
    dh, dweight = jnp.zeros_like(h32), []
    for p, ref in enumerate((dq, dk, dv)):
        rows, dupdate = _rows_of(p, down), ref[0]
        a_h, weight = low[0, rows].astype(jnp.float32), _over_ranks(weights, p, rank, rows)
        dlow = _product(up[rows], dupdate, _INNER)  # [M r, N]
        dweight += [jnp.sum(x, axis=0, keepdims=True) for x in jnp.split(dlow * a_h, len(a_h) // rank)]
        da_h = (dlow * weight).astype(a.dtype)
        _add(ddown, _product(da_h, h, _INNER), first, rows)
        _add(dup, _product((a_h * weight).astype(a.dtype), dupdate, _LANES), first, rows)
        dh += _product(da_h, down[rows], _ROWS)
    experts = len(dweight) // PROJECTIONS
    if weights.shape[1] == experts:  # q, k and v share one choice
        dweight = [sum(dweight[m::experts]) for m in range(experts)]
    for row, one in enumerate(dweight):
        dweights[0, row : row + 1] = one
    _pull_back(dh, normal, inverse, scale, da, dshift, dscale, 0.0)


def _modulated(a, shift, scale):
    """h and LN(a), [N, D] float32, and 1 / deviation of a, [N, 1]."""
    x = a[0].astype(jnp.float32)
    mean, inverse = moments(x)
    normal = (x - mean) * inverse
    return normal * (1 + scale[0].astype(jnp.float32)) + shift[0].astype(jnp.float32), normal, inverse


def _pull_back(dh, normal, inverse, scale, da, dshift, dscale, more):
    """Writes the gradients of a and of the modulation, given that of h; `more` is added to that of a."""
    first = pl.program_id(2) == 0
    _add(dshift, jnp.sum(dh, axis=0, keepdims=True), first)
    _add(dscale, jnp.sum(dh * normal, axis=0, keepdims=True), first)
    dnormal = dh * (1 + scale[0].astype(jnp.float32))
    along = jnp.mean(dnormal * normal, axis=1, keepdims=True)
    dx = inverse * (dnormal - jnp.mean(dnormal, axis=1, keepdims=True) - normal * along)
    da[0] = (dx + more).astype(da.dtype)


def _projected(h, kernel):
    """The centred kernel times h [C, N], the centred kernel [C, D], the mean and 1 / deviation of h [N, 1]."""
    centred = kernel[...] - jnp.mean(kernel[...], axis=1, keepdims=True)
    return _float32_product(centred, h, _LANES), centred, *moments(h)


def _first_of_half():
    return (pl.program_id(1) == 0) & (pl.program_id(2) == 0)


def _add(ref, x, first, rows=slice(None)):
    """Adds x to the rows of a result [1, R, D] that several programs share; the first program sets it."""

    @pl.when(first)
    def _():
        ref[0, rows] = x

    @pl.when(jnp.logical_not(first))
    def _():
        ref[0, rows] += x


def _rows_of(p: int, weights) -> slice:
    """The rows of the weights that hold projection p's experts."""
    size = weights.shape[0] // PROJECTIONS
    return slice(p * size, (p + 1) * size)


def _over_ranks(weights, p: int, rank: int, rows: slice):
    """The experts' weights for projection p, each repeated over its r rows, [M r, N]."""
    experts = (rows.stop - rows.start) // rank
    first = 0 if weights.shape[1] == experts else p * experts
    each = [weights[0, first + m : first + m + 1] for m in range(experts)]
    return jnp.concatenate([jnp.broadcast_to(one, (rank, one.shape[1])) for one in each])


def _product(a, b, contracted):
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _float32_product(a, b, contracted):
    """A product in full float32 precision, without bfloat16 passes."""
    return jax.lax.dot_general(a, b, contracted, precision=HIGHEST, preferred_element_type=jnp.float32)


def _as_row(column):
    """[N, 1] -> [1, N]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _as_column(row):
    """[1, N] -> [N, 1]."""
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]
