"""The configuration: frozen dataclasses with every field and default, and the way from a ConfigDict to them.

Each part of the package declares the settings it reads; this file adds those of the jobs, puts them together and checks
what concerns more than one of them. Experiments under configs/ start from `default_config()` and change fields; every
mistake ends in one line (`UserError`) before any device is touched.
"""

import dataclasses
import difflib
import functools
import types
import typing

import ml_collections
from ml_collections import config_dict

from trm_diffusion.data.sources import CAPTIONED_SOURCES, SOURCES, DataConfig
from trm_diffusion.diffusion.guidance import check_guidance
from trm_diffusion.diffusion.objective import DiffusionConfig
from trm_diffusion.diffusion.samplers import check_sampler
from trm_diffusion.errors import UserError
from trm_diffusion.models.architecture import ARCHITECTURES, ModelConfig
from trm_diffusion.models.experts import DISPATCH
from trm_diffusion.models.gate import FORWARD_WEIGHTS, GATE_INPUTS
from trm_diffusion.models.halting import HALTING
from trm_diffusion.models.recursion import BASE_INPUTS, POOLS, RESIDUALS, ROUTING_SCOPES, recursive_blocks
from trm_diffusion.models.remat import POLICIES
from trm_diffusion.models.text import ENCODERS
from trm_diffusion.runtime.checkpoints import CheckpointConfig
from trm_diffusion.runtime.logging import LogConfig
from trm_diffusion.runtime.optimizer import SCHEDULES, OptimConfig
from trm_diffusion.runtime.sharding import MeshConfig

LABEL_RULES = ("balanced", "random")
CHOICES = {  # field: the values it may take
    "model.architecture": ARCHITECTURES,
    "model.text.encoder": ENCODERS,
    "model.frequency_shift": (0, 1),
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
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "mesh.expert": 1,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    updates: int = 1000  # optimiser updates in the run
    batch_size: int = 128  # images in an update, over all devices
    accumulate: int = 1  # gradient accumulation: an update's batch is run in this many equal parts
    latent_steps: tuple = ()  # () the model's T; (t,) fixed; (low, high) drawn uniformly for each update
    latent_step_loss_weight: float = (
        0.0  # weight of the mean loss with fewer latent steps, 1 .. T - 1 (T - 1 more passes)
    )
    label_dropout: float = 0.1  # share of labels, or texts, replaced by none, for classifier-free guidance
    trainable: str = "all"  # all, recursion (gates and experts alone), or comma-separated path patterns
    frozen_dtype: str = "float32"  # of parameters that are not trained, gates and experts apart: float32 or bfloat16
    nonfinite_limit: int = 10  # non-finite updates in a row (each skipped) after which the run gives up


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    sampler: str = "euler"  # euler, heun, ab2 (multistep), ddim, or ddpm (ancestral; objective ddpm only)
    diffusion_steps: int = 50  # network evaluations, or pairs of them for heun
    eta: float = 0.0  # ddim: share of fresh noise, 0 deterministic, 1 as noisy as ddpm
    guidance: float = 1.0  # classifier-free guidance scale; 1 is the conditional model alone
    guidance_interval: tuple = (0.0, 1.0)  # normalized times (0 clean, 1 noise) at which guidance acts
    guidance_channels: str = "all"  # all, or dit3 (the first three channels, as in the published DiT)
    latent_steps: int | None = None  # T at inference; None is the model's
    parameters: str = "ema"  # ema (the first average), raw, or an average named by its decay
    classes: tuple = ()  # labels to draw, a row of the grid each; () is every class, at most ten
    per_class: int = 10  # images of each label or prompt, a row of the grid
    batch_size: int = 256  # images denoised at a time, over all devices
    seed: int = 0  # of the noise; each image's noise depends on the seed and its index alone


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    kind: str = "none"  # none, digits (judge accuracy, Frechet distance, memorisation), scenes (text following)
    num_samples: int = 2000  # images generated for the measures; scenes: of seen compositions, and as many of others
    label_rule: str = "balanced"  # labels of the generated images: balanced (round robin) or random
    min_class_accuracy: float = 0.9  # digits: `pass` needs the generated images' class accuracy to reach this
    min_judge_accuracy: float = 0.97  # and the judge's own accuracy on real test images this
    min_strict_score: float = 0.6  # scenes: `pass` needs the strict overall score of seen compositions to reach this


@dataclasses.dataclass(frozen=True)
class InitConfig:
    workdir: str = (
        ""  # start from the parameters of another run (first average) or a converted directory; "" from scratch
    )
    adapter: str = ""  # gates and experts to lay onto that, as --mode=convert --to-layout=adapter exports them
    missing: str = ""  # patterns of parameters that run may lack, such as "*/recursion/*"; these start fresh


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a job needs to know."""

    name: str = "experiment"  # of the run: its default workdir is runs/NAME
    seed: int = 0  # of initial weights, data order, noise and dropout
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def default_config() -> ml_collections.ConfigDict:
    """A ConfigDict with every field at its default, for an experiment file to change."""
    return _to_config_dict(Config)


def _to_config_dict(cls) -> ml_collections.ConfigDict:
    result, hints = ml_collections.ConfigDict(), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            result[field.name] = _to_config_dict(hints[field.name])
        elif field.default is None:
            result[field.name] = config_dict.placeholder(_plain_type(hints[field.name]))
        else:
            result[field.name] = field.default
    return result


def _plain_type(hint) -> type:
    """int for `int`, and for `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def resolve(config: ml_collections.ConfigDict) -> Config:
    """ConfigDict -> validated `Config`. Raises UserError with one line for any mistake."""
    resolved = _build(Config, config, "config")
    _check(resolved)
    return resolved


def _build(cls, values, where: str):
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise unknown_field(f"{where}.{name}")
    fields = {}
    for name in values:
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(values[name], ml_collections.ConfigDict | dict):
                raise UserError(f"{where}.{name} is a group of fields, not {values[name]!r}")
            fields[name] = _build(hints[name], values[name], f"{where}.{name}")
        else:
            fields[name] = _typed(values[name], hints[name], f"{where}.{name}")
    try:
        return cls(**fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _typed(value, hint, where: str):
    """The value as the field's type; an int passes for a float and a list for a tuple, nothing else does."""
    wanted = _plain_type(hint)
    if value is None and wanted is not hint:
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple and isinstance(value, list | tuple):
        if any(isinstance(entry, bool) or not isinstance(entry, int | float) for entry in value):
            raise UserError(f"{where} takes numbers separated by commas, not {value!r}")
        return tuple(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{where} takes a {wanted.__name__}, not {value!r}")
    return value


def unknown_field(path: str) -> UserError:
    """The error for a field that does not exist, with the nearest that does."""
    known = list(_field_paths(Config, "config"))
    group, _, leaf = path.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    near = (
        difflib.get_close_matches(path, siblings, n=1, cutoff=0.85)
        or [name for name in known if name.rpartition(".")[2] == leaf]
        or difflib.get_close_matches(path, known, n=1, cutoff=0.0)
    )
    return UserError(f"{path} is not a field; did you mean {near[0]}?")


def field_exists(path: str) -> bool:
    """Is "config.optim.lr" a field?"""
    return path in _field_paths(Config, "config")


def _field_paths(cls, where: str):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{where}.{field.name}"
        yield path
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _field_paths(hints[field.name], path)


def variant(argument: str | None, **defaults: str) -> dict[str, str]:
    """The options of a config file's argument, "model=S/2,recursion=off", over their defaults."""
    options = dict(defaults)
    for part in filter(None, (argument or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            known = ", ".join(f"{key}={value}" for key, value in defaults.items())
            raise UserError(f'config argument "{part}" is not one of this file\'s options, which are {known}')
        options[name] = value
    return options


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check(config: Config) -> None:
    """Ranges of single fields, then what concerns more than one."""
    for path, choices in CHOICES.items():
        value = _field(config, path)
        _require(value in choices, f"config.{path} is {value!r}; choose one of {', '.join(map(str, choices))}")
    for path, smallest in AT_LEAST.items():
        value = _field(config, path)
        _require(value is None or value >= smallest, f"config.{path} is {value}; it must be at least {smallest}")
    _check_model(config)
    _check_condition(config)
    _check_training(config)
    _check_sampling(config)


def _field(config: Config, path: str):
    return functools.reduce(getattr, path.split("."), config)


def _check_model(config: Config) -> None:
    model, recursion, mesh = config.model, config.model.recursion, config.mesh
    for fields, value, divisor in (
        ("model.width is not a multiple of config.model.heads", model.width, model.heads),
        ("model.width is not a multiple of 4 (sine-cosine positions)", model.width, 4),
        ("data.image_size is not a multiple of config.model.patch", config.data.image_size, model.patch),
        ("model.width is not a multiple of config.mesh.fsdp", model.width, mesh.fsdp),
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


def _check_condition(config: Config) -> None:
    """The model is conditioned on what the data hold."""
    model, text, source = config.model, config.model.text, config.data.source
    if model.architecture == "dit":
        _require(
            source not in CAPTIONED_SOURCES and config.data.num_classes >= 1,
            f"config.model.architecture dit needs labels; config.data.source {source} with config.data.num_classes "
            f"{config.data.num_classes} has none",
        )
        return
    if model.reads_words:
        _require(
            source in CAPTIONED_SOURCES,
            f"config.model.text.encoder learned needs captions; config.data.source {source} has none, "
            f"{', '.join(CAPTIONED_SOURCES)} have",
        )
        _require(
            text.features % text.heads == 0 and text.features % 2 == 0,
            f"config.model.text.features {text.features} must be even and a multiple of config.model.text.heads "
            f"{text.heads}",
        )
        for fields, value, divisor in (
            ("features is not a multiple of config.mesh.fsdp", text.features, config.mesh.fsdp),
            ("heads is not a multiple of config.mesh.tensor", text.heads, config.mesh.tensor),
        ):
            _require(value % divisor == 0, f"config.model.text.{fields}: {value} and {divisor}")
        _require(
            text.features == text.pooled_features,
            f"config.model.text.pooled_features {text.pooled_features} must equal config.model.text.features "
            f"{text.features} with config.model.text.encoder learned",
        )
    else:
        _require(
            source == "synthetic",
            f"config.model.text.encoder encoded needs encoded text: config.data.source synthetic, not {source}",
        )
    _require(
        model.mmdit.dual_attention_blocks <= model.depth,
        f"config.model.mmdit.dual_attention_blocks {model.mmdit.dual_attention_blocks} exceeds config.model.depth "
        f"{model.depth}",
    )
    grid = config.data.image_size // model.patch
    _require(
        grid <= model.mmdit.position_max_size,
        f"config.model.mmdit.position_max_size {model.mmdit.position_max_size} is less than the {grid} tokens a side "
        "of config.data.image_size over config.model.patch",
    )


def _check_training(config: Config) -> None:
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
    _require(mesh.data == -1 or mesh.data >= 1, f"config.mesh.data is {mesh.data}; it must be -1 or at least 1")
    check_batch(config, max(1, mesh.data) * mesh.fsdp * mesh.expert)


def _check_sampling(config: Config) -> None:
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


def check_batch(config: Config, shards: int) -> None:
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


def to_dict(config: Config) -> dict:
    """Plain nested dictionaries and lists, for JSON."""
    return dataclasses.asdict(config)
