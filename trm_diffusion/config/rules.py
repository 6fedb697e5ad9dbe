"""Rules between fields of several parts of the configuration.

What a single field takes is stated in its dataclass, and relations within one part (DiffusionConfig, RecursionConfig)
are checked there as well, for whoever uses that part alone. Everything here is checked before any device is touched,
except the batch, which must also fit the devices that are found.
"""

import functools

from trm_diffusion.conditions import kind_of
from trm_diffusion.config.schema import Config
from trm_diffusion.diffusion.guidance import check_guidance
from trm_diffusion.diffusion.samplers import check_sampler
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.judges import judge_class
from trm_diffusion.models.recursion.config import recursive_blocks


def check(config: Config) -> None:
    """Raises UserError, in one line, for the first rule that the config breaks."""
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
    """The field at `path` is a multiple of the field `of`. A mesh axis of -1 is settled later, and allows any."""
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
        recursive_blocks(recursion.blocks, config.model.depth)
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
    """Raises UserError unless batches divide over shards and accumulated parts, and these over routing groups."""
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
    averages = tuple(map(str, config.optim.ema_decays))
    _require(
        sample.parameters in (("ema", "raw", *averages) if averages else ("raw",)),
        f"config.sample.parameters is {sample.parameters!r}; this run keeps {', '.join(('raw', *averages))}",
    )


def _check_evaluation(config: Config) -> None:
    kind = config.evaluate.kind
    if kind == "none":
        return
    judge = judge_class(kind)
    _require(
        config.data.source in judge.sources,
        f"config.evaluate.kind {kind} is for images of config.data.source {' or '.join(judge.sources)} only",
    )
    _require(
        judge.condition == kind_of(config).name,
        f"config.evaluate.kind {kind} is for models conditioned on a {judge.condition}; this one is conditioned on a "
        f"{kind_of(config).name}",
    )
