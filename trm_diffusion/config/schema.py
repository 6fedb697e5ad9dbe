"""The configuration: frozen dataclasses with every field and default, and the way from a ConfigDict to them.

Each part of the package declares the settings it reads; this file adds those of the jobs and puts them together;
config/rules.py checks them. Experiments under configs/ start from `default_config()` and change fields; every mistake
ends in one line (`UserError`) before any device is touched.
"""

import dataclasses

from trm_diffusion.data.base import DataConfig
from trm_diffusion.diffusion.objective import DiffusionConfig
from trm_diffusion.models.architecture import ModelConfig
from trm_diffusion.runtime.checkpoints import CheckpointConfig
from trm_diffusion.runtime.logging import LogConfig
from trm_diffusion.runtime.optimizer import OptimConfig
from trm_diffusion.runtime.sharding import MeshConfig


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
