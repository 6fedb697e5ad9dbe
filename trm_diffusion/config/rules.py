"""Rules that relate fields of several parts of the configuration.

A dataclass states what each of its fields may hold, and checks relations within that part (DiffusionConfig,
RecursionConfig), so that the part can be used on its own. The rules here are checked before any device is touched. The
batch size is checked again once the devices are known.
"""

import functools

from trm_diffusion.conditions import kind_of
from trm_diffusion.config.schema import Config
from trm_diffusion.diffusion.guidance import check_guidance
from trm_diffusion.diffusion.samplers import check_sampler
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.judges import judge_class
from trm_diffusion.models.recursion.looped import looped_blocks


def check(config: Config) -> None:
    """Raises a one-line UserError for the first rule that the config breaks."""
    _check_model(config)
    _check_recursion(config)
    kind_of(config).check_config(config)
    _check_training(config)
    _check_sampling(config)
    _check_evaluation(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_multiple(config: Config, path: str, of: str) -> None:
    """Requires the field `path` to be a multiple of the field `of`. A mesh axis of -1 (decided later) accepts any."""
    value, divisor = (functools.reduce(getattr, name.split("."), config) for name in (path, of))
    _require(
        value % max(1, divisor) == 0,
        f"config.{path} {value} is not a multiple of config.{of} {divisor}",
    )


def _check_model(config: Config) -> None:
    _require_multiple(config, "model.width", of="model.heads")
    _require_multiple(config, "data.image_size", of="model.patch")
    _require_multiple(config, "model.width", of="mesh.fsdp")
    _require_multiple(config, "model.heads", of="mesh.tensor")


def _check_recursion(config: Config) -> None:
    recursion, latent_steps = config.model.recursion, config.train.latent_steps
    _require_multiple(config, "model.recursion.experts", of="mesh.expert")
    _require(
        not (recursion.balance_bias_rate and recursion.pool != "shared")
        or tuple(latent_steps) in ((), (recursion.latent_steps,)),
        f"config.train.latent_steps is {latent_steps}, but config.model.recursion.balance_bias_rate with pool "
        f"per_latent_step moves the bias of every pool: leave it out, or give {recursion.latent_steps}, the "
        "config.model.recursion.latent_steps",
    )
    try:
        looped_blocks(recursion, config.model.depth)
    except ValueError as error:
        raise UserError(f"config.model.recursion.blocks: {error}") from None
    _require(
        len(latent_steps) <= 2
        and all(isinstance(t, int) and 1 <= t <= recursion.latent_steps for t in latent_steps)
        and list(latent_steps) == sorted(latent_steps),
        f"config.train.latent_steps is {latent_steps}; give one number or low,high, from 1 to "
        f"config.model.recursion.latent_steps {recursion.latent_steps}",
    )
    _require(
        recursion.pool == "shared" or (config.sample.latent_steps or 1) <= recursion.latent_steps,
        f"config.sample.latent_steps {config.sample.latent_steps} exceeds the {recursion.latent_steps} pools of "
        "config.model.recursion.pool per_latent_step",
    )


def _check_training(config: Config) -> None:
    mesh = config.mesh
    check_batch(config, max(1, mesh.data) * max(1, mesh.fsdp) * mesh.expert)


def check_batch(config: Config, shards: int) -> None:
    """Raises UserError unless batches divide into shards and accumulation parts, and these into routing groups."""
    train, recursion = config.train, config.model.recursion
    parts = shards * train.accumulate
    _require(
        train.batch_size % parts == 0,
        f"config.train.batch_size {train.batch_size} is not divisible by {shards} devices x "
        f"config.train.accumulate {train.accumulate}",
    )
    _require(
        config.sample.batch_size % shards == 0,
        f"config.sample.batch_size {config.sample.batch_size} is not divisible by {shards} devices",
    )
    part = train.batch_size // parts
    _require(
        recursion.blocks == "none" or part % recursion.routing_group == 0,
        f"config.model.recursion.routing_group {recursion.routing_group} does not divide the {part} images that a "
        "device processes at a time (config.train.batch_size over devices and config.train.accumulate)",
    )


def _check_sampling(config: Config) -> None:
    sample, diffusion, data = config.sample, config.diffusion, config.data
    _require(
        len(sample.guidance_interval) == 2,
        f"config.sample.guidance_interval is {sample.guidance_interval}; give two normalized times, low,high",
    )
    try:
        check_sampler(sample.sampler, diffusion.objective, sample.eta)
        check_guidance(sample.guidance_interval, sample.guidance_channels)
    except ValueError as error:
        raise UserError(f"config.sample: {error}") from None
    _require(
        diffusion.objective != "ddpm" or sample.diffusion_steps <= diffusion.timesteps,
        f"config.sample.diffusion_steps {sample.diffusion_steps} exceeds config.diffusion.timesteps "
        f"{diffusion.timesteps}",
    )
    _require(
        all(isinstance(label, int) and label < data.num_classes for label in sample.classes),
        f"config.sample.classes is {sample.classes}; labels go from 0 to {data.num_classes - 1}",
    )
    decays = tuple(map(str, config.optim.ema_decays))
    parameters = ("ema", "raw", *decays) if decays else ("raw",)
    _require(
        sample.parameters in parameters,
        f"config.sample.parameters is {sample.parameters!r}; choose one of {', '.join(parameters)}",
    )


def _check_evaluation(config: Config) -> None:
    kind = config.evaluate.kind
    if kind == "none":
        return
    judge = judge_class(kind)
    _require(
        config.data.source in judge.sources,
        f"config.evaluate.kind {kind} needs config.data.source {' or '.join(judge.sources)}, not {config.data.source}",
    )
    _require(
        judge.condition == kind_of(config).name,
        f"config.evaluate.kind {kind} is for models conditioned on a {judge.condition}; this one is conditioned on a "
        f"{kind_of(config).name}",
    )
