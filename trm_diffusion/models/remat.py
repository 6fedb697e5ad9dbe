"""Named rematerialisation policies: what the backward pass keeps and what it recomputes.

The table is for a block without recursion, by arithmetic. Kept: in units of N D numbers of the computation's dtype (N
tokens of D features; 18.9 MB each in DiT-XL/2 with 32 images). Recomputed: the share of the block's forward products,
at DiT-XL/2's sizes. `python -m benchmarks.xl2_step` reports the TPU compiler's figures for time and memory.

    policy     kept                                                         recomputed
    none       every intermediate that the compiler cannot do without       nothing
    dots       10: the input, q, k, v, both outputs, the MLP's hidden (4)   attention, 4%
    selective   5: the input, q, k, v, the MLP's output                     attention, its output, the MLP's hidden, 44%
    full        1: the input                                                all
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"

POLICIES = {  # name -> what may be saved, as `jax.checkpoint` takes it; None is everything
    "none": None,
    "selective": jax.checkpoint_policies.save_only_these_names(_KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the outputs of products with weights
    "full": jax.checkpoint_policies.nothing_saveable,
}


def kept(x: jax.Array) -> jax.Array:
    """x, marked to be kept by the policy "selective"."""
    return checkpoint_name(x, _KEPT)


def rematerialized(function: Callable, policy: str, *, in_loop: bool) -> Callable:
    """`function` under the named policy.

    in_loop: `function` is the body of a loop. XLA cannot merge what the backward loop recomputes with the original in
    the forward loop; elsewhere barriers must prevent the merge.
    """
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=not in_loop)
