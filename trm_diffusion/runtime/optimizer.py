"""The optimiser, its schedule, and exponential moving averages of the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from trm_diffusion.runtime.parameters import Parameters

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "linear")
_MUON_RMS = 0.2  # of an update over its learning rate: near AdamW's (Liu et al. 2025, arXiv 2502.16982)
DECAYED = (
    "kernel",
    "down",
    "up",
    "token_kernel",
    "condition_kernel",
)  # matrices; not biases, scales, embeddings


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    optimizer: str = "adamw"  # adamw, or muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest
    lr: float = 1e-4  # peak learning rate of AdamW
    muon_lr_ratio: float = 5.0  # muon: the learning rate of its matrices over that of the rest
    schedule: str = "constant"  # after the warm-up: constant, cosine (to lr_end) or linear (to lr_end)
    warmup_steps: int = 0  # updates over which the learning rate rises linearly from zero
    lr_end: float = 0.0  # learning rate at the last update of a decaying schedule
    b1: float = 0.9  # AdamW first-moment decay
    b2: float = 0.999  # AdamW second-moment decay
    eps: float = 1e-8  # AdamW epsilon
    weight_decay: float = 0.0  # decoupled decay, of matrices alone
    clip_norm: float = 0.0  # clip the global gradient norm to this; 0 does not clip
    ema_decays: tuple = (0.9999,)  # moving averages kept in float32; the first is what is sampled from
    ema_warmup: bool = True  # decay min(d, (1 + n) / (10 + n)) at update n, so that short runs forget the start


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Update number -> learning rate."""
    decay_steps = max(1, total_steps - config.warmup_steps)
    after = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, decay_steps, config.lr_end / config.lr if config.lr else 0.0),
        "linear": optax.linear_schedule(config.lr, config.lr_end, decay_steps),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    # The first update already moves: n = 0 gives lr / warmup_steps.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW or Muon on a flat dictionary of parameters, after optional clipping by global norm.

    Muon (Jordan 2024; optax's) takes the matrices of attention and MLP in the blocks, each block's apart where blocks
    are stacked; weight decay is then of these alone. All the rest has Adam, with Nesterov's momentum too.
    """
    rate = learning_rate(config, total_steps)
    if config.optimizer == "muon":
        optimizer = optax.contrib.muon(
            lambda update: config.muon_lr_ratio * rate(update),
            weight_decay=config.weight_decay,
            eps=config.eps,
            adam_learning_rate=rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_muon_matrices,
            consistent_rms=_MUON_RMS,
        )
    else:
        optimizer = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda parameters: {name: name.rsplit("/", 1)[-1] in DECAYED for name in parameters},
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _muon_matrices(parameters: Parameters) -> dict:
    """Which two axes of each parameter are a matrix for Muon, or None. Modulations act on vectors, and are left out."""
    return {
        name: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        if "/blocks/" in name and name.endswith("/kernel") and "/modulation/" not in name
        else None
        for name, leaf in parameters.items()
    }


def ema_decay(decay: float, updates: jax.Array, warmup: bool) -> jax.Array:
    """The decay used at update number `updates` (0 for the first), float32."""
    if not warmup:
        return jnp.float32(decay)
    n = updates.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))


def update_ema(ema: Parameters, parameters: Parameters, decay: jax.Array) -> Parameters:
    """ema <- decay * ema + (1 - decay) * parameters, in float32.

    Written as a small step from `ema`: the sum of two products, which optax.incremental_update computes, rounds `ema`
    itself at every update, and at a decay of 0.9999 ends several times as far from the exact average.
    """
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, parameters)
