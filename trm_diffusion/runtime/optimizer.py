"""The optimiser, its learning-rate schedule, and exponential moving averages (EMA) of the parameters."""

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.runtime.parameters import Parameters

_MUON_RMS = 0.2  # RMS of an update / learning rate, near AdamW's (Liu et al. 2025, arXiv 2502.16982)
# Weight decay applies to matrices, not to biases, scales and embeddings.
DECAYED = ("kernel", "down", "up", "token_kernel", "condition_kernel")

SCHEDULES = {  # name in the config: (config, decay_steps) -> the schedule after the warm-up
    "constant": lambda config, _: optax.constant_schedule(config.lr),
    "cosine": lambda config, decay_steps: optax.cosine_decay_schedule(
        config.lr, decay_steps, config.lr_end / config.lr if config.lr else 0.0
    ),
    "linear": lambda config, decay_steps: optax.linear_schedule(config.lr, config.lr_end, decay_steps),
}


def _adamw(config: "OptimConfig", rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda parameters: {name: name.rsplit("/", 1)[-1] in DECAYED for name in parameters},
    )


def _muon(config: "OptimConfig", rate: optax.Schedule) -> optax.GradientTransformation:
    """optax's Muon (Jordan 2024) for the attention and MLP matrices of the blocks, Adam for all other parameters.

    Each block's matrices are orthogonalised separately, also where blocks are stacked. Only these matrices have weight
    decay. Adam uses Nesterov momentum too.
    """
    return optax.contrib.muon(
        lambda update: config.muon_lr_ratio * rate(update),
        weight_decay=config.weight_decay,
        eps=config.eps,
        adam_learning_rate=rate,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_muon_matrices,
        consistent_rms=_MUON_RMS,
    )


def _muon_matrices(parameters: Parameters) -> dict:
    """The two matrix axes of each parameter that Muon updates, None for others. Modulations act on vectors: None."""
    return {
        name: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        if "/blocks/" in name and name.endswith("/kernel") and "/modulation/" not in name
        else None
        for name, leaf in parameters.items()
    }


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}  # name in the config: (config, learning rate) -> transformation


@dataclasses.dataclass(frozen=True)
class OptimConfig(Settings):
    # muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest
    optimizer: str = setting("adamw", choices=OPTIMIZERS)
    lr: float = setting(1e-4, least=0)  # peak learning rate of AdamW
    # learning rates by parameter, PATTERN=FACTOR,..., such as "*/experts/up=16" (LoRA+); the first that matches counts
    lr_multipliers: str = ""
    muon_lr_ratio: float = setting(5.0, least=0)  # muon: learning rate of its matrices / that of the rest
    # after the warm-up: constant, cosine (to lr_end) or linear (to lr_end)
    schedule: str = setting("constant", choices=SCHEDULES)
    warmup_steps: int = setting(0, least=0)  # updates over which the learning rate rises linearly from zero
    lr_end: float = setting(0.0, least=0)  # learning rate at the last update of a decaying schedule
    b1: float = setting(0.9, least=0, below=1)  # AdamW first-moment decay
    b2: float = setting(0.999, least=0, below=1)  # AdamW second-moment decay
    eps: float = setting(1e-8, least=0)  # AdamW epsilon
    weight_decay: float = setting(0.0, least=0)  # decoupled weight decay, only of matrices
    clip_norm: float = setting(0.0, least=0)  # clip the global gradient norm to this; 0 does not clip
    # one float32 EMA of the parameters for each decay; samples are drawn from the first
    ema_decays: tuple = setting((0.9999,), least=0, below=1)
    ema_warmup: bool = True  # decay min(d, (1 + n) / (10 + n)) at update n, so short runs forget the initial values

    def __post_init__(self):
        super().__post_init__()
        multipliers(self)


def multipliers(config: OptimConfig) -> dict[str, float]:
    """The factors of `lr_multipliers` by pattern. Raises ValueError, in one line, for any other text."""
    factors = {}
    for part in filter(None, config.lr_multipliers.split(",")):
        pattern, _, factor = part.rpartition("=")
        try:
            factors[pattern] = float(factor)
        except ValueError:
            factors[pattern] = -1.0
        if not pattern or not 0 <= factors[pattern] < math.inf:
            raise ValueError(f'lr_multipliers has {part!r}; give PATTERN=FACTOR,... such as "*/experts/up=16"')
    return factors


def multiplied(optimizer: optax.GradientTransformation, factors: dict[str, float]) -> optax.GradientTransformation:
    """The optimiser, with each update times the factor of the first pattern that its path matches; else 1."""

    def factor(name: str) -> float | None:
        return next((factor for pattern, factor in factors.items() if fnmatch.fnmatch(name, pattern)), None)

    def update(gradients, state, parameters=None):
        updates, state = optimizer.update(gradients, state, parameters)
        factor_of = {name: factor(name) for name in updates}
        return {n: u if factor_of[n] is None else factor_of[n] * u for n, u in updates.items()}, state

    return optax.GradientTransformation(optimizer.init, update)


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Update number -> learning rate."""
    after = SCHEDULES[config.schedule](config, max(1, total_steps - config.warmup_steps))
    if not config.warmup_steps:
        return after
    # The first update already moves: n = 0 gives lr / warmup_steps.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW or Muon on a flat dictionary of parameters, after optional clipping by global norm."""
    optimizer = OPTIMIZERS[config.optimizer](config, learning_rate(config, total_steps))
    if config.lr_multipliers:
        optimizer = multiplied(optimizer, multipliers(config))
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def ema_decay(decay: float, updates: jax.Array, warmup: bool) -> jax.Array:
    """The decay used at update number `updates` (0 for the first), float32."""
    if not warmup:
        return jnp.float32(decay)
    n = updates.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))


def update_ema(ema: Parameters, parameters: Parameters, decay: jax.Array) -> Parameters:
    """ema <- decay * ema + (1 - decay) * parameters, in float32.

    Computed as a small change to `ema`. The sum of two products, as in optax.incremental_update, rounds `ema` itself at
    every update and, at a decay of 0.9999, ends several times as far from the exact EMA.
    """
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, parameters)
