"""Named rematerialisation policies: what the backward pass keeps and what it computes again."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"

# name -> (what it costs, the policy that says what may be saved)
POLICIES = {
    "none": ("keeps every intermediate, computes nothing again", None),
    "projections": (
        "keeps q, k and v of the block's attention",
        jax.checkpoint_policies.save_only_these_names(_KEPT),
    ),
    "dots": ("keeps the matmul outputs of weights", jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": ("keeps the inputs alone, computes all of it again", jax.checkpoint_policies.nothing_saveable),
}


def kept(x: jax.Array) -> jax.Array:
    """x, which the policy "projections" keeps."""
    return checkpoint_name(x, _KEPT)


def rematerialized(function: Callable, policy: str, *, in_loop: bool) -> Callable:
    """`function` under the named policy.

    in_loop: it is the body of a loop, across whose passes XLA cannot merge what is computed twice; elsewhere barriers
    must keep it from doing so.
    """
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy][1], prevent_cse=not in_loop)
