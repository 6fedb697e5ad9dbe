"""Named rematerialisation policies: what the backward pass keeps and what it computes again.

For a block without recursion, by arithmetic: what is kept in N D numbers of the computation's dtype (N tokens of D
features; in DiT-XL/2 with 32 images 18.9 MB each), and what share of the block's forward products is computed again,
at DiT-XL/2's sizes. `python -m benchmarks.xl2_step` measures time and memory by the TPU compiler.

    policy     kept                                                         computed again
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
    """x, which the policy "selective" keeps."""
    return checkpoint_name(x, _KEPT)


def rematerialized(function: Callable, policy: str, *, in_loop: bool) -> Callable:
    """`function` under the named policy.

    in_loop: it is the body of a loop, across whose passes XLA cannot merge what is computed twice; elsewhere barriers
    must keep it from doing so.
    """
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=not in_loop)
