"""How tokens reach their experts.

Three implementations of one function, equal up to rounding. `auto` takes the cheapest (`cheapest_dispatch`):

    dense     every expert for every token, as one wide matmul, masked in the r-wide middle: M times the useful products
    capacity  each expert gathers its C tokens, and each token gathers its updates back. Only empty slots waste
              products. The backward pass gathers too, instead of scattering
    one_hot   the same, with products by one-hot matrices instead of gathers, for hardware that gathers slowly

On a TPU models/kernels/fused_latent_step.py replaces `dense` where it can.

On an expert axis of E devices each device owns M / E experts. Their weights are gathered where the tokens are, as with
fsdp, and routing groups stay with their images. Bytes that a device with S tokens receives in the forward pass of one
latent step, with figures for DiT-XL/2 (D = 1152, r = 128, bfloat16, 32 images, k = 1) and E = M:

                                                       bytes / 2 D                      M = 2     M = 16
    tokens to all, updates of q, k, v summed back      (1 + 3) S (E - 1)                75 MB   1,132 MB
    tokens to their experts and back (all-to-all)      (1 + 3) 1.25 k S (E - 1) / E     47 MB      88 MB
    weights to the tokens                              6 M r (E - 1) / E                 2 MB      27 MB

Gathering the weights moves the least from 1.2 M r / k tokens per device on: 307 for M = 2, ten images for M = 16. XLA
chooses it by itself for `dense` and `one_hot`. For `capacity` it may move indices and sum tokens instead, so it is
told. tests/jobs/test_devices.py checks the compiled programs.
"""

import functools

import jax
import jax.numpy as jnp

from trm_diffusion.models.recursion.assignment import Assignment, position_in_expert
from trm_diffusion.models.recursion.config import PROJECTIONS

DENSE_FROM = 0.8  # `auto`: with room for this share of the tokens, each expert may as well compute all
ROW_COST = 600  # `auto`, TPU: cost of moving a row into or out of place, in products per feature


def expert_updates(h_bnd, down_pmrd, up_pmrd, assignment: Assignment, capacity: int | None, dispatch: str) -> jax.Array:
    """The weighted low-rank updates [B, N, 3, D] by the implementation that `dispatch` names.

    h_bnd: the tokens of all routing groups in order, B * N = G * S; [G, S, D] works too.
    capacity: C as given to `assign`. None drops no token, and the implementation is then always dense.
    "auto" decides by the platform that the program is compiled for, which may differ from the one it is compiled on.
    """
    operands, tokens = (h_bnd, down_pmrd, up_pmrd, assignment), assignment.dispatched.shape[1]
    if capacity is None:
        return dense_updates(*operands)
    capacity = min(capacity, tokens)

    def implementation(name: str):
        return functools.partial(IMPLEMENTATIONS[name], capacity=capacity)

    if dispatch != "auto":
        return implementation(dispatch)(*operands)
    _, experts, rank, _ = down_pmrd.shape
    choices = assignment.dispatched.shape[2]
    on_tpu, elsewhere = (cheapest_dispatch(on, tokens, experts, capacity, choices, rank) for on in ("tpu", "default"))
    if on_tpu == elsewhere:
        return implementation(elsewhere)(*operands)
    return jax.lax.platform_dependent(*operands, tpu=implementation(on_tpu), default=implementation(elsewhere))


def cheapest_dispatch(platform: str, tokens: int, experts: int, capacity: int, choices: int, rank: int) -> str:
    """The rule of "auto" for a routing group of `tokens`; docs/results/benchmark_experts.json has the measurements.

    On a TPU: dense or one_hot, by their products forward and backward; its compiler puts a gather of rows far above
    both. Elsewhere: capacity, unless the experts have slots for nearly all tokens.
    """
    if platform != "tpu":
        return "capacity" if capacity < DENSE_FROM * tokens else "dense"
    slots = experts * capacity
    moves = choices + PROJECTIONS  # rows that each token is moved in, and out
    pair = 3 * 2 * PROJECTIONS * rank  # products for one expert's update of one token and feature
    one_hot = pair * slots / tokens + moves * (2 * slots + ROW_COST)  # one-hot matrices have no gradient
    return "dense" if pair * experts <= one_hot else "one_hot"


def dense_updates(h_bnd, down_pmrd, up_pmrd, assignment: Assignment, capacity: int | None = None) -> jax.Array:
    """Every expert for every token. The weights mask the r-wide middle, so that M experts are one wide matmul.

    Tokens stay in their images, and each projection has its own product: the attention needs the updates by image and
    by projection, so that anything else would copy them.
    """
    del capacity  # every expert has room for every token
    weights = assignment.combine.reshape(*h_bnd.shape[:2], *assignment.combine.shape[2:], 1)  # [B, N, P, M, 1]
    low = jnp.einsum("bnd,pmrd->bnpmr", h_bnd, down_pmrd)
    low = low * weights.astype(low.dtype)  # P = 1 broadcasts over q, k, v
    low = jnp.split(low, PROJECTIONS, axis=2)
    return jnp.stack([jnp.einsum("bnmr,mrd->bnd", low[p].squeeze(2), up_pmrd[p]) for p in range(PROJECTIONS)], axis=2)


def capacity_updates(h_bnd, down_pmrd, up_pmrd, assignment: Assignment, capacity: int) -> jax.Array:
    """Each expert gathers the tokens it takes, and each token gathers its updates back."""
    h_gsd = _in_groups(h_bnd, assignment)
    groups, _, width = h_gsd.shape
    experts = down_pmrd.shape[1]

    def by_expert(x):  # [G, M * C, W] -> [M, G * C, W]: the groups join in one matmul for each expert
        return x.reshape(groups, experts, capacity, -1).swapaxes(0, 1).reshape(experts, groups * capacity, -1)

    def by_group(x):  # the inverse
        return x.reshape(experts, groups, capacity, -1).swapaxes(0, 1).reshape(groups, experts * capacity, -1)

    updates = []
    for choice, projections in _choices(assignment):
        slot = assignment.slot[:, :, choice]  # [G, S, k]
        token = slot_to_token(slot, experts * capacity)[..., None]  # [G, M * C, 1]
        rows = by_expert(_fetch(h_gsd, token, slot))
        weights = by_expert(_fetch(assignment.combine[:, :, choice], token, slot))  # [M, G * C, M]
        weights = jnp.einsum("mcm->mc", weights)[..., None].astype(rows.dtype)
        down = down_pmrd[projections]  # [p, M, r, D]
        low = jnp.einsum("mcd,mrd->mcr", rows, down.swapaxes(0, 1).reshape(experts, -1, width)) * weights
        for low_mcr, up_mrd in zip(jnp.split(low, len(down), axis=-1), up_pmrd[projections], strict=True):
            updates.append(_fetch(by_group(jnp.einsum("mcr,mrd->mcd", low_mcr, up_mrd)), slot, token))
    return jnp.stack(updates, axis=2).reshape(*h_bnd.shape[:2], PROJECTIONS, width)


def one_hot_updates(h_bnd, down_pmrd, up_pmrd, assignment: Assignment, capacity: int) -> jax.Array:
    """Like `capacity_updates`, with one-hot products instead of gathers, as in GShard and Switch transformers."""
    h_gsd = _in_groups(h_bnd, assignment)
    positions = jnp.where(assignment.dispatched, position_in_expert(assignment.dispatched), capacity)
    updates = []
    for choice, projections in _choices(assignment):
        slots = jax.nn.one_hot(positions[:, :, choice], capacity, dtype=h_gsd.dtype)  # [G, S, M, C]
        weights = jnp.einsum("gsmc,gsm->gmc", slots.astype(jnp.float32), assignment.combine[:, :, choice])
        rows = jnp.einsum("gsmc,gsd->gmcd", slots, h_gsd)
        low = jnp.einsum("gmcd,pmrd->gmcpr", rows, down_pmrd[projections])
        low = low * weights[..., None, None].astype(low.dtype)
        high = jnp.einsum("gmcpr,pmrd->gmcpd", low, up_pmrd[projections])
        updates.append(jnp.einsum("gsmc,gmcpd->gspd", slots, high))
    return jnp.concatenate(updates, axis=2).reshape(*h_bnd.shape[:2], PROJECTIONS, h_bnd.shape[2])


IMPLEMENTATIONS = {"dense": dense_updates, "capacity": capacity_updates, "one_hot": one_hot_updates}


def _in_groups(h_bnd: jax.Array, assignment: Assignment) -> jax.Array:
    """[B, N, D] -> [G, S, D]."""
    return h_bnd.reshape(*assignment.dispatched.shape[:2], -1)


def _choices(assignment: Assignment) -> list[tuple[int, slice]]:
    """(choice, the projections it routes): one choice of all three, or one for each."""
    if assignment.dispatched.shape[2] == 1:
        return [(0, slice(0, PROJECTIONS))]
    return [(choice, slice(choice, choice + 1)) for choice in range(PROJECTIONS)]


def slot_to_token(slot_gsk: jax.Array, slots: int) -> jax.Array:
    """The token in each slot, [G, slots] int32; S, which is no token, in an empty slot."""
    tokens = slot_gsk.shape[1]
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slot_gsk.shape[1:])
    empty = jnp.full((slots,), tokens, jnp.int32)
    return jax.vmap(lambda slot: empty.at[slot].set(token, mode="drop"))(slot_gsk)


@jax.custom_vjp
def _fetch(rows_gaw: jax.Array, source_gbj: jax.Array, destination_gal: jax.Array) -> jax.Array:
    """Sum of rows by index, [G, A, W] -> [G, B, W]: row b of the result is the sum over j of rows[source[b, j]].

    An index past the end adds nothing. destination [G, A, L] is the inverse: where each row went. With it the backward
    pass is a gather too; the transpose of a gather would be a scatter.
    """
    del destination_gal
    take = jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=0))
    return sum(take(rows_gaw, source_gbj[..., j]) for j in range(source_gbj.shape[-1]))


def _fetch_forward(rows, source, destination):
    return _fetch(rows, source, destination), (source, destination)


def _fetch_backward(indices, cotangent):
    source, destination = indices
    return _fetch(cotangent, destination, source), None, None


_fetch.defvjp(_fetch_forward, _fetch_backward)
