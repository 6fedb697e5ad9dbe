"""The configuration: frozen dataclasses with every field, its default and its allowed values.

Each part of the package declares the settings it reads. This file declares those of the jobs and combines them all.
Each field states its own choices and bounds (models/settings.py); config/rules.py relates fields of several parts.
"""

import dataclasses

from trm_diffusion.data.base import DataConfig
from trm_diffusion.diffusion.guidance import GUIDED_CHANNELS
from trm_diffusion.diffusion.objective import DiffusionConfig
from trm_diffusion.diffusion.samplers import SAMPLERS
from trm_diffusion.metrics.judges import JUDGES
from trm_diffusion.models.architecture import ModelConfig
from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.runtime.checkpoints import CheckpointConfig
from trm_diffusion.runtime.logging import LogConfig
from trm_diffusion.runtime.optimizer import OptimConfig
from trm_diffusion.runtime.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    updates: int = setting(1000, least=1)  # optimiser updates in the run
    batch_size: int = setting(128, least=1)  # images per update, over all devices
    accumulate: int = setting(1, least=1)  # gradient accumulation: each batch is processed in this many equal parts
    latent_steps: tuple = ()  # (): the model's T; (t,): fixed; (low, high): uniform in this range for each update
    # weight of the loss averaged over 1 .. T - 1 latent steps (costs T - 1 more passes)
    latent_step_loss_weight: float = setting(0.0, least=0)
    latent_step_loss_power: float = setting(0.0, least=0)  # in that average, the loss at t latent steps weighs t^power
    # fraction of labels, texts or context images replaced by the null condition, for classifier-free guidance
    label_dropout: float = setting(0.1, least=0, below=1)
    trainable: str = "all"  # all, recursion (only gates and experts), or comma-separated path patterns
    # dtype of non-trainable parameters, except gates and experts
    frozen_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    nonfinite_limit: int = setting(10, least=1)  # the run stops after this many non-finite (skipped) updates in a row


@dataclasses.dataclass(frozen=True)
class SampleConfig(Settings):
    sampler: str = setting("euler", choices=SAMPLERS)  # ab2 is multistep; ddpm is ancestral and needs objective ddpm
    diffusion_steps: int = setting(50, least=1)  # one network evaluation each; heun takes two, the last step one
    eta: float = setting(0.0, least=0, most=1)  # ddim: amount of fresh noise; 0 is deterministic, 1 is as noisy as ddpm
    guidance: float = 1.0  # classifier-free guidance scale; 1 is no guidance
    # normalized times (0 clean, 1 noise) at which guidance acts
    guidance_interval: tuple = setting((0.0, 1.0), least=0, most=1)
    # dit3: the first three channels, as in the published DiT
    guidance_channels: str = setting("all", choices=GUIDED_CHANNELS)
    latent_steps: int | None = setting(None, least=1)  # T at inference; None uses the model's
    parameters: str = "ema"  # ema (the first decay), raw, or an EMA named by its decay
    classes: tuple = setting((), least=0)  # labels to draw, one grid row each; () is every class, at most ten
    per_class: int = setting(10, least=1)  # images per label, prompt or context, one grid row
    batch_size: int = setting(256, least=1)  # images denoised at a time, over all devices
    seed: int = setting(0, least=0)  # seed of the noise; an image's noise depends only on this and its index


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Settings):
    # digits: class accuracy, Frechet distance, memorisation; scenes: prompt following; mazes, frozen_lake: share solved
    kind: str = setting("none", choices=("none", *JUDGES))
    # images to generate; scenes: this many of seen and of held-out compositions each
    num_samples: int = setting(2000, least=2)
    # labels of the generated images: balanced (round robin) or random
    label_rule: str = setting("balanced", choices=("balanced", "random"))
    min_class_accuracy: float = 0.9  # digits: minimum class accuracy of generated images for `pass`
    min_judge_accuracy: float = 0.97  # digits: minimum accuracy of the judge on real test images for `pass`
    min_strict_score: float = 0.6  # scenes: minimum strict overall score of seen compositions for `pass`
    min_solved: float = setting(0.8, least=0, most=1)  # mazes, frozen_lake: minimum share of solved ones for `pass`


@dataclasses.dataclass(frozen=True)
class InitConfig(Settings):
    # start from the parameters of another run (first EMA) or a converted directory; "" starts from scratch
    workdir: str = setting("", path=True)
    # gates and experts to add, as exported by --mode=convert --to-layout=adapter
    adapter: str = setting("", path=True)
    # go on from this checkpoint of the run itself and set newer ones aside; None, or the same command again: the newest
    step: int | None = setting(None, least=1)
    missing: str = ""  # patterns of parameters to initialise if init.workdir lacks them, such as "*/recursion/*"


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run and its jobs."""

    name: str = "experiment"  # name of the run; its default workdir is runs/NAME
    seed: int = setting(0, least=0)  # seed of initial weights, data order, noise and dropout
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
