"""Halting: tokens that need no further latent steps stop, each on its own.

A stopped token's state a is frozen. It asks its experts for nothing and takes none of their capacity. The others go on
attending to its last keys and values. A token that stops before the first latent step still asks in that one,
for keys and values to show; otherwise the others would attend to zeros. The last latent step, which the block's own
attention shares, is computed for every token. Two rules (both our reading; the paper names static T as a limitation):

    convergence   without parameters: a token stops once ||a_t - a_{t-1}|| / ||a_t|| < epsilon, `patience` latent steps
                  in a row
    learned       PonderNet's form (arXiv 2107.05407): a head gives lambda_t = sigmoid(w LN(a_t) + b), the chance to
                  stop at t = 0 .. T-1 if still running, so p_t = lambda_t prod_{s<t} (1 - lambda_s), the last t taking
                  the rest. In training every token runs, its state becomes the expected one, sum_t p_t a_t, and the
                  loss gains KL(p || geometric prior). At inference a token stops at the first t by which it has
                  stopped with probability 1/2.

What halting saves: shapes are fixed at compile time, and at inference the experts are one wide product over all tokens
(dispatch.py), so a stopped token saves no row of it, and no attention, while others run. Inference saves whole latent
steps once every token of the batch has stopped (`jax.lax.while_loop`). Training runs all latent steps; there a stopped
token leaves its slots to others. `--mode=analyze` measures the savings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trm_diffusion.models.layers import ZEROS, layer_norm, linear


class Progress(NamedTuple):
    """The halting state of each token."""

    running: jax.Array  # [B, N] bool, still refined
    streak: jax.Array  # [B, N] int32, latent steps in a row with a small change (convergence)
    survival: jax.Array  # [B, N] float32, probability of not having stopped (learned)
    expected: jax.Array  # [B, N, D] float32, sum of p_t a_t so far (learned, training)
    divergence: jax.Array  # [B, N] float32, KL(p || prior) so far (learned, training)


class Halting(nnx.Module):
    """Decides after each latent step which tokens go on. The learned rule adds width + 1 parameters."""

    def __init__(self, width: int, rule: str, *, epsilon: float, patience: int, prior: float, rngs: nnx.Rngs):
        self.rule, self.epsilon, self.patience, self.prior = rule, epsilon, patience, prior
        learned = rule == "learned"
        self.head = (
            linear(width, 1, axes=("embed", None), init=ZEROS, dtype=jnp.float32, rngs=rngs) if learned else None
        )

    def start(self, a_bnd: jax.Array, latent_steps, *, training: bool) -> Progress:
        """Before the first latent step; with the learned rule a token may stop at once, with state a_0."""
        tokens = a_bnd.shape[:2]
        progress = Progress(
            running=jnp.ones(tokens, bool),
            streak=jnp.zeros(tokens, jnp.int32),
            survival=jnp.ones(tokens, jnp.float32),
            expected=jnp.zeros(a_bnd.shape, jnp.float32),
            divergence=jnp.zeros(tokens, jnp.float32),
        )
        if self.rule == "learned":
            progress = self._learned(progress, a_bnd, 0, latent_steps, training)
        return progress

    def advance(self, progress: Progress, before, after, t, latent_steps, *, training: bool) -> Progress:
        """After latent step t (from 1), which took the states `before` to `after`, [B, N, D]."""
        if self.rule == "learned":
            return self._learned(progress, after, t, latent_steps, training)
        change = _norm(after.astype(jnp.float32) - before.astype(jnp.float32))
        small = change < self.epsilon * _norm(after.astype(jnp.float32))
        streak = jnp.where(small, progress.streak + 1, 0)
        return progress._replace(running=progress.running & (streak < self.patience), streak=streak)

    def _learned(self, progress, a_bnd, t, latent_steps, training) -> Progress:
        last = jnp.asarray(t == latent_steps - 1)
        chance = jax.nn.sigmoid(self.head(layer_norm(a_bnd.astype(jnp.float32)))[..., 0])  # lambda_t, [B, N]
        chance = jnp.where(last, 1.0, chance)
        stops = progress.survival * chance  # p_t
        survival = progress.survival * (1.0 - chance)
        if not training:
            return progress._replace(running=progress.running & (survival > 0.5), survival=survival)
        prior = jnp.where(last, 1.0, self.prior) * (1.0 - self.prior) ** jnp.asarray(t, jnp.float32)
        divergence = jnp.where(stops > 0, stops * jnp.log(jnp.where(stops > 0, stops, 1.0) / prior), 0.0)
        return progress._replace(
            survival=survival,
            expected=progress.expected + stops[..., None] * a_bnd.astype(jnp.float32),
            divergence=progress.divergence + divergence,
        )


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
