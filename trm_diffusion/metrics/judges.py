"""Judges of generated images: what `--mode=evaluate` measures, one class per `evaluate.kind`.

A new judge is a subclass of `Judge` in its own file, and a line in `JUDGES`.
"""

import abc
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trm_diffusion.data.base import DataConfig
from trm_diffusion.errors import UserError
from trm_diffusion.runtime.random import Purpose

JUDGES = {  # `evaluate.kind`: its class
    "digits": "trm_diffusion.metrics.digits:DigitsJudge",
    "scenes": "trm_diffusion.metrics.scenes.judge:SceneJudge",
    "mazes": "trm_diffusion.metrics.mazes:MazeJudge",
    "frozen_lake": "trm_diffusion.metrics.frozen_lake:FrozenLakeJudge",
}


class Picture(NamedTuple):
    """Some of the images, to show with `per_class` in a row."""

    images: np.ndarray  # [N, H, W, C]
    captions: Sequence[str] | None = None  # [N]


class Evaluation(NamedTuple):
    measures: dict  # for JSON
    passed: bool  # whether the measures reach the thresholds in the config
    pictures: dict[str, Picture]  # by file name, without a suffix


class Judge(abc.ABC):
    """Requests images from a run and measures them.

    Attributes:
      sources: the `data.source`s whose images it can judge.
      condition: the kind of condition it requests images by, as named in conditions/: "label", "caption in words",
        or "context image".
    """

    sources: tuple[str, ...]
    condition: str

    def __init__(self, data: DataConfig, settings: Any, *, seed: int, per_class: int):
        """settings: the config's `evaluate`; seed: `sample.seed`; per_class: images in a row of a picture."""
        self.data, self.settings, self.seed, self.per_class = data, settings, seed, per_class

    @abc.abstractmethod
    def evaluate(self, generate: Callable[[Sequence], np.ndarray]) -> Evaluation:
        """Measures the images [N, H, W, C], nominally in [-1, 1], that `generate` draws for N labels or captions.

        Raises UserError for images that are not finite.
        """

    def labels(self) -> np.ndarray:
        """The labels [num_samples] int32 to request, by `evaluate.label_rule`."""
        settings = self.settings
        return draw_labels(settings.label_rule, settings.num_samples, self.data.num_classes, self.seed)


def judge_class(kind: str) -> type[Judge]:
    return pkgutil.resolve_name(JUDGES[kind])


def draw_labels(rule: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels [count] int32, never sorted by class: cycling if the rule is balanced, otherwise uniformly random."""
    if rule == "balanced":
        return np.arange(count, dtype=np.int32) % num_classes
    rng = np.random.default_rng([seed, int(Purpose.SAMPLING)])
    return rng.integers(0, num_classes, count, dtype=np.int32)


def checked_images(images: np.ndarray, shape: tuple[int, int, int], what: str) -> np.ndarray:
    """Generated images as float64 [N, *shape]. Raises UserError if any is not finite; what: their name."""
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or images.shape[1:] != shape:
        raise ValueError(f"images must be [N, *{shape}], not {images.shape}")
    broken = ~np.isfinite(images).all((1, 2, 3))
    if broken.any():
        raise UserError(
            f"{broken.sum()} of {len(images)} generated {what} are not finite (the first is number {broken.argmax()}): "
            "the model or the sampler diverged, evaluate an earlier checkpoint"
        )
    return images
