"""The gate: which experts a visual token uses at one latent step, from the token, the timestep and the condition.

logits = W_x LN(h) + W_y y                                  float32, always                      (paper)
training:   z = (logits + Gumbel(0, 1)) / tau, the top k of z are selected                       (paper)
inference:  z = logits / tau, no noise                                                           (paper)
weights:    straight-through: forward exactly 1 for k = 1, softmax(z) renormalised over the k
            selected otherwise; backward always through softmax(z)                               (our reading)
            soft: softmax(z) of the selected, forward and backward                               (our reading)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.layers import NORMAL_002, moments
from trm_diffusion.models.recursion.config import GATE_INPUTS

HIGHEST = jax.lax.Precision.HIGHEST  # full float32 precision, no bfloat16 passes


class Conditioning(NamedTuple):
    """What a block gets besides its tokens. The conditioning vector y is the sum of the two."""

    timestep: jax.Array  # [B, D] embedding of the diffusion timestep
    condition: jax.Array  # [B, D] embedding of the class, or of the pooled text

    @property
    def vector(self) -> jax.Array:
        return self.timestep + self.condition


class Routing(NamedTuple):
    """One gate decision. P is the number of separate choices: 1, or 3 when q, k and v are routed separately."""

    experts: jax.Array  # [B, N, P, k] int32, the selected experts, best first
    weights: jax.Array  # [B, N, P, k] float32, what each selected expert's output is multiplied by
    probabilities: jax.Array  # [B, N, P, M] float32, softmax(z)
    logits: jax.Array  # [B, N, P, M] float32, before noise and temperature


class Gate(nnx.Module):
    """Scores M experts for each token by the equations above. Adds 2 P M D parameters, and P M for a balance bias."""

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        experts_per_token: int = 1,
        choices: int = 1,
        temperature: float = 5.0,
        inputs: tuple[str, ...] = GATE_INPUTS,
        forward_weight: str = "straight_through",
        balance_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.experts_per_token = experts_per_token
        self.temperature = temperature
        self.inputs = tuple(inputs)
        self.forward_weight = forward_weight
        axes = {"logical_axes": ("embed", None, "expert")}
        shape = (width, choices, experts)
        self.token_kernel = nnx.Param(NORMAL_002(rngs.params(), shape, jnp.float32), **axes)  # W_x
        self.condition_kernel = nnx.Param(NORMAL_002(rngs.params(), shape, jnp.float32), **axes)  # W_y
        # Moved after each update towards an even load, never by a gradient; see models/recursion/balance.py.
        self.balance_bias = nnx.Param(jnp.zeros((choices, experts), jnp.float32)) if balance_bias else None

    def token_logits(self, h_bnd: jax.Array) -> jax.Array:
        """W_x LN(h), [B, N, P, M] float32; zeros if tokens are not an input of the gate."""
        if "tokens" not in self.inputs:
            return jnp.zeros((*h_bnd.shape[:2], *self.token_kernel.shape[1:]), jnp.float32)
        # LN(h) W = (h - mean h) W / sigma = h (W - mean W) / sigma, which needs no copy of the normalised tokens.
        h32, kernel = h_bnd.astype(jnp.float32), self.token_kernel[...]
        centred = kernel - jnp.mean(kernel, axis=0, keepdims=True)
        projected = jnp.einsum("bnd,dpm->bnpm", h32, centred, precision=HIGHEST)
        return projected * moments(h32)[1][..., None]

    def condition_logits(self, conditioning: Conditioning) -> jax.Array:
        """W_y y, summed over the inputs that the gate has, [B, P, M] float32."""
        sources = [getattr(conditioning, name) for name in ("timestep", "condition") if name in self.inputs]
        y_bd = sum((source.astype(jnp.float32) for source in sources), jnp.zeros(conditioning.timestep.shape))
        return jnp.einsum("bd,dpm->bpm", y_bd, self.condition_kernel[...], precision=HIGHEST)

    def logits(self, h_bnd: jax.Array, conditioning: Conditioning) -> jax.Array:
        """W_x LN(h) + W_y y over the inputs that the gate has, [B, N, P, M] float32."""
        return self.token_logits(h_bnd) + self.condition_logits(conditioning)[:, None]

    def __call__(self, h_bnd: jax.Array, conditioning: Conditioning, key: jax.Array | None) -> Routing:
        """Routes every token. `key` draws the Gumbel noise of training; None means inference, without noise."""
        return self.route(self.logits(h_bnd, conditioning), key)

    def route(self, logits: jax.Array, key: jax.Array | None) -> Routing:
        """Like a call, but from the logits [B, N, P, M]."""
        noise = 0.0 if key is None else jax.random.gumbel(key, logits.shape, jnp.float32)
        z = (logits + noise) / self.temperature
        scores = jax.lax.stop_gradient(z if self.balance_bias is None else z + self.balance_bias[...][None, None])
        experts = _best(scores, self.experts_per_token)  # [B, N, P, k]
        probabilities = jax.nn.softmax(z, axis=-1)
        # One-hot, since the gradient of a gather is a scatter, and for few experts the gather itself is slower too.
        chosen = jax.nn.one_hot(experts, probabilities.shape[-1], dtype=jnp.float32)  # [B, N, P, k, M]
        weights = jnp.sum(chosen * probabilities[..., None, :], axis=-1)
        if self.forward_weight == "straight_through":
            total = jnp.sum(weights, axis=-1, keepdims=True)
            # A balance bias may select experts whose probabilities underflow; their ratios are still those of exp(z).
            without = jax.nn.softmax(jnp.sum(chosen * z[..., None, :], axis=-1), axis=-1)
            renormalized = jnp.where(total < jnp.finfo(jnp.float32).tiny, without, weights / total)
            # In this order the forward value is the renormalised weight to the last bit.
            weights = jax.lax.stop_gradient(renormalized) + (weights - jax.lax.stop_gradient(weights))
        return Routing(experts, weights, probabilities, logits)


def _best(scores: jax.Array, count: int) -> jax.Array:
    """Indices int32 [..., count] of the largest scores [..., M], best first, ties to the earlier.

    Like `jax.lax.top_k`, which the compiler does not shard: it would gather the scores of all devices on each.
    """
    best = []
    for _ in range(count):
        index = jnp.argmax(scores, axis=-1)
        scores = jnp.where(jax.nn.one_hot(index, scores.shape[-1], dtype=bool), -jnp.inf, scores)
        best.append(index.astype(jnp.int32))
    return jnp.stack(best, axis=-1)
