"""What a configuration may say: ranges of single fields, and what concerns more than one of them.

Everything here is checked before any device is touched, but for the batch, which must fit the devices that are found.
"""

import functools
from typing import TYPE_CHECKING

from trm_diffusion.conditions import kind_of
from trm_diffusion.data.sources import SOURCES
from trm_diffusion.diffusion.guidance import check_guidance
from trm_diffusion.diffusion.samplers import check_sampler
from trm_diffusion.errors import UserError
from trm_diffusion.models.architecture import ARCHITECTURES
from trm_diffusion.models.attention import IMPLEMENTATIONS
from trm_diffusion.models.recursion.config import (
    BASE_INPUTS,
    DISPATCH,
    POOLS,
    RESIDUALS,
    ROUTING_SCOPES,
    recursive_blocks,
)
from trm_diffusion.models.recursion.gate import FORWARD_WEIGHTS, GATE_INPUTS
from trm_diffusion.models.recursion.halting import HALTING
from trm_diffusion.models.remat import POLICIES
from trm_diffusion.models.text import ENCODERS, RECIPES
from trm_diffusion.runtime.optimizer import OPTIMIZERS, SCHEDULES

if TYPE_CHECKING:
    from trm_diffusion.config.schema import Config

LABEL_RULES = ("balanced", "random")
CHOICES = {  # field: the values it may take
    "model.architecture": ARCHITECTURES,
    "model.text.encoder": ENCODERS,
    "model.text.recipe": RECIPES,
    "model.text.pretrained_dtype": ("float32", "float16", "bfloat16"),
    "model.frequency_shift": (0, 1),
    "model.attention": IMPLEMENTATIONS,
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": tuple(POLICIES),
    "model.recursion.forward_weight": FORWARD_WEIGHTS,
    "model.recursion.base_input": BASE_INPUTS,
    "model.recursion.residual": RESIDUALS,
    "model.recursion.pool": POOLS,
    "model.recursion.routing_scope": ROUTING_SCOPES,
    "model.recursion.dispatch": DISPATCH,
    "model.recursion.remat": tuple(POLICIES),
    "model.recursion.halting": HALTING,
    "train.frozen_dtype": ("float32", "bfloat16"),
    "data.source": SOURCES,
    "optim.optimizer": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
    "evaluate.kind": ("none", "digits", "scenes"),
    "evaluate.label_rule": LABEL_RULES,
}
AT_LEAST = {  # field: its smallest value
    "seed": 0,
    "model.depth": 1,
    "model.width": 4,
    "model.heads": 1,
    "model.patch": 1,
    "model.mlp_ratio": 0.01,
    "model.mmdit.dual_attention_blocks": 0,
    "model.mmdit.position_max_size": 1,
    "model.mmdit.position_base_size": 1,
    "model.text.length": 1,
    "model.text.features": 2,
    "model.text.pooled_features": 1,
    "model.text.depth": 0,
    "model.text.heads": 1,
    "model.text.vocabulary": 4,
    "model.recursion.latent_steps": 1,
    "model.recursion.experts": 1,
    "model.recursion.experts_per_token": 1,
    "model.recursion.rank": 1,
    "model.recursion.routing_group": 1,
    "model.recursion.temperature": 1e-3,
    "model.recursion.capacity_factor": 0.01,
    "model.recursion.truncated_latent_steps": 0,
    "model.recursion.switch_loss_weight": 0,
    "model.recursion.z_loss_weight": 0,
    "model.recursion.balance_bias_rate": 0,
    "model.recursion.halting_epsilon": 0,
    "model.recursion.halting_patience": 1,
    "model.recursion.halting_weight": 0,
    "train.latent_step_loss_weight": 0,
    "data.image_size": 1,
    "data.channels": 1,
    "data.num_classes": 0,
    "data.synthetic_records": 1,
    "data.workers": 0,
    "train.updates": 1,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.nonfinite_limit": 1,
    "optim.lr": 0,
    "optim.lr_end": 0,
    "optim.muon_lr_ratio": 0,
    "optim.warmup_steps": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "log.every": 1,
    "log.samples_every": 0,
    "sample.diffusion_steps": 1,
    "sample.eta": 0,
    "sample.latent_steps": 1,
    "sample.per_class": 1,
    "sample.batch_size": 1,
    "sample.seed": 0,
    "evaluate.num_samples": 2,
    "mesh.tensor": 1,
    "mesh.expert": 1,
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check(config: "Config") -> None:
    """Raises UserError, in one line, for the first mistake."""
    for path, choices in CHOICES.items():
        value = _field(config, path)
        _require(value in choices, f"config.{path} is {value!r}; choose one of {', '.join(map(str, choices))}")
    for path, smallest in AT_LEAST.items():
        value = _field(config, path)
        _require(value is None or value >= smallest, f"config.{path} is {value}; it must be at least {smallest}")
    _check_model(config)
    kind_of(config).check_config(config)
    _check_training(config)
    _check_sampling(config)


def _field(config: "Config", path: str):
    return functools.reduce(getattr, path.split("."), config)


def _check_model(config: "Config") -> None:
    model, recursion, mesh = config.model, config.model.recursion, config.mesh
    for fields, value, divisor in (
        ("model.width is not a multiple of config.model.heads", model.width, model.heads),
        ("model.width is not a multiple of 4 (sine-cosine positions)", model.width, 4),
        ("data.image_size is not a multiple of config.model.patch", config.data.image_size, model.patch),
        ("model.width is not a multiple of config.mesh.fsdp", model.width, max(1, mesh.fsdp)),
        ("model.heads is not a multiple of config.mesh.tensor", model.heads, mesh.tensor),
        ("model.recursion.experts is not a multiple of config.mesh.expert", recursion.experts, mesh.expert),
    ):
        _require(value % divisor == 0, f"config.{fields}: {value} and {divisor}")
    _require(
        recursion.experts_per_token <= recursion.experts,
        f"config.model.recursion.experts_per_token {recursion.experts_per_token} exceeds "
        f"config.model.recursion.experts {recursion.experts}",
    )
    inputs = recursion.gate_inputs.split(",")
    _require(
        set(inputs) <= set(GATE_INPUTS),
        f"config.model.recursion.gate_inputs is {recursion.gate_inputs!r}; name some of {','.join(GATE_INPUTS)}",
    )
    _require(
        0.0 < recursion.halting_prior < 1.0,
        f"config.model.recursion.halting_prior is {recursion.halting_prior}; it must be in (0, 1)",
    )
    _require(
        not (recursion.balance_bias_rate and recursion.pool != "shared" and len(config.train.latent_steps) == 2),
        "config.model.recursion.balance_bias_rate with pool per_latent_step needs a fixed config.train.latent_steps",
    )
    try:
        recursive_blocks(recursion.blocks, model.depth)
    except ValueError as error:
        raise UserError(f"config.model.recursion.blocks: {error}") from None


def _check_training(config: "Config") -> None:
    train, optim, recursion = config.train, config.optim, config.model.recursion
    _require(
        0.0 <= train.label_dropout < 1.0,
        f"config.train.label_dropout is {train.label_dropout}; it must be in [0, 1)",
    )
    _require(
        len(train.latent_steps) <= 2
        and all(isinstance(t, int) and 1 <= t <= recursion.latent_steps for t in train.latent_steps)
        and list(train.latent_steps) == sorted(train.latent_steps),
        f"config.train.latent_steps is {train.latent_steps}; give one number or low,high, from 1 to "
        f"config.model.recursion.latent_steps {recursion.latent_steps}",
    )
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        _require(0.0 <= value < 1.0, f"config.optim.{name} is {value}; it must be in [0, 1)")
    _require(
        all(0.0 <= decay < 1.0 for decay in optim.ema_decays),
        f"config.optim.ema_decays is {optim.ema_decays}; each must be in [0, 1)",
    )
    mesh = config.mesh
    for axis in ("data", "fsdp"):
        size = getattr(mesh, axis)
        _require(size == -1 or size >= 1, f"config.mesh.{axis} is {size}; it must be -1 or at least 1")
    check_batch(config, max(1, mesh.data) * max(1, mesh.fsdp) * mesh.expert)


def _check_sampling(config: "Config") -> None:
    sample, recursion, data = config.sample, config.model.recursion, config.data
    _require(
        len(sample.guidance_interval) == 2,
        f"config.sample.guidance_interval is {sample.guidance_interval}; give two normalized times, low,high",
    )
    try:
        check_sampler(sample.sampler, config.diffusion.objective, sample.eta)
        check_guidance(sample.guidance_interval, sample.guidance_channels)
    except ValueError as error:
        raise UserError(f"config.sample: {error}") from None
    _require(
        config.diffusion.objective != "ddpm" or sample.diffusion_steps <= config.diffusion.timesteps,
        f"config.sample.diffusion_steps {sample.diffusion_steps} exceeds config.diffusion.timesteps "
        f"{config.diffusion.timesteps}",
    )
    _require(
        recursion.pool == "shared" or (sample.latent_steps or 1) <= recursion.latent_steps,
        f"config.sample.latent_steps {sample.latent_steps} exceeds the {recursion.latent_steps} pools of "
        "config.model.recursion.pool per_latent_step",
    )
    _require(
        all(isinstance(label, int) and 0 <= label < data.num_classes for label in sample.classes),
        f"config.sample.classes is {sample.classes}; labels go from 0 to {data.num_classes - 1}",
    )
    averages = tuple(map(str, config.optim.ema_decays))
    _require(
        sample.parameters in (("ema", "raw", *averages) if averages else ("raw",)),
        f"config.sample.parameters is {sample.parameters!r}; this run keeps {', '.join(('raw', *averages))}",
    )
    _require(
        config.evaluate.kind in ("none", data.source),
        f"config.evaluate.kind {config.evaluate.kind} is for images of config.data.source {config.evaluate.kind} only",
    )


def check_batch(config: "Config", shards: int) -> None:
    """Batches divide over their shards and accumulated parts, and these over routing groups, or UserError."""
    train, recursion = config.train, config.model.recursion
    parts = shards * train.accumulate
    _require(
        train.batch_size % parts == 0,
        f"config.train.batch_size {train.batch_size} does not divide over {shards} devices x "
        f"{train.accumulate} accumulated parts",
    )
    _require(
        config.sample.batch_size % shards == 0,
        f"config.sample.batch_size {config.sample.batch_size} does not divide over {shards} devices",
    )
    part = train.batch_size // parts
    _require(
        recursion.blocks == "none" or part % recursion.routing_group == 0,
        f"config.model.recursion.routing_group {recursion.routing_group} does not divide the {part} images that a "
        "device holds at a time (config.train.batch_size over devices and accumulated parts)",
    )
