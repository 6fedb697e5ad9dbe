"""The configuration: frozen dataclasses with every field, its default and the values it takes.

Each part of the package declares the settings it reads; this file adds those of the jobs and puts them together. A
field states its choices and bounds itself (models/settings.py); config/rules.py relates fields of several parts.
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
    batch_size: int = setting(128, least=1)  # images in an update, over all devices
    accumulate: int = setting(1, least=1)  # gradient accumulation: an update's batch is run in this many equal parts
    latent_steps: tuple = ()  # () the model's T; (t,) fixed; (low, high) drawn uniformly for each update
    # weight of the mean loss with fewer latent steps, 1 .. T - 1 (T - 1 more passes)
    latent_step_loss_weight: float = setting(0.0, least=0)
    # share of labels, or texts, replaced by none, for classifier-free guidance
    label_dropout: float = setting(0.1, least=0, below=1)
    trainable: str = "all"  # all, recursion (gates and experts alone), or comma-separated path patterns
    # of parameters that are not trained, gates and experts apart
    frozen_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    nonfinite_limit: int = setting(10, least=1)  # non-finite updates in a row (each skipped) after which the run stops


@dataclasses.dataclass(frozen=True)
class SampleConfig(Settings):
    sampler: str = setting("euler", choices=SAMPLERS)  # ab2 is multistep; ddpm is ancestral, for objective ddpm only
    diffusion_steps: int = setting(50, least=1)  # network evaluations, or pairs of them for heun
    eta: float = setting(0.0, least=0, most=1)  # ddim: share of fresh noise, 0 deterministic, 1 as noisy as ddpm
    guidance: float = 1.0  # classifier-free guidance scale; 1 is the conditional model alone
    # normalized times (0 clean, 1 noise) at which guidance acts
    guidance_interval: tuple = setting((0.0, 1.0), least=0, most=1)
    # dit3: the first three channels, as in the published DiT
    guidance_channels: str = setting("all", choices=GUIDED_CHANNELS)
    latent_steps: int | None = setting(None, least=1)  # T at inference; None is the model's
    parameters: str = "ema"  # ema (the first average), raw, or an average named by its decay
    classes: tuple = setting((), least=0)  # labels to draw, a row of the grid each; () is every class, at most ten
    per_class: int = setting(10, least=1)  # images of each label or prompt, a row of the grid
    batch_size: int = setting(256, least=1)  # images denoised at a time, over all devices
    seed: int = setting(0, least=0)  # of the noise; each image's noise depends on the seed and its index alone


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Settings):
    # digits: judge accuracy, Frechet distance, memorisation; scenes: text following
    kind: str = setting("none", choices=("none", *JUDGES))
    # images generated for the measures; scenes: of seen compositions, and as many of others
    num_samples: int = setting(2000, least=2)
    # labels of the generated images: balanced (round robin) or random
    label_rule: str = setting("balanced", choices=("balanced", "random"))
    min_class_accuracy: float = 0.9  # digits: `pass` needs the generated images' class accuracy to reach this
    min_judge_accuracy: float = 0.97  # and the judge's own accuracy on real test images this
    min_strict_score: float = 0.6  # scenes: `pass` needs the strict overall score of seen compositions to reach this


@dataclasses.dataclass(frozen=True)
class InitConfig(Settings):
    # start from the parameters of another run (first average) or a converted directory; "" from scratch
    workdir: str = ""
    adapter: str = ""  # gates and experts to lay onto that, as --mode=convert --to-layout=adapter exports them
    missing: str = ""  # patterns of parameters that run may lack, such as "*/recursion/*"; these start fresh


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Everything a job needs to know."""

    name: str = "experiment"  # of the run: its default workdir is runs/NAME
    seed: int = setting(0, least=0)  # of initial weights, data order, noise and dropout
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
