"""Class labels, for a DiT."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from trm_diffusion.conditions.base import LABELS, ROWS_SHOWN, TEXTS, Condition, SampleRequest
from trm_diffusion.data.base import Source
from trm_diffusion.data.sources import CAPTIONED_SOURCES
from trm_diffusion.errors import UserError

if TYPE_CHECKING:
    from trm_diffusion.config import Config


class Labels(Condition):
    """int32 [B], 0 .. num_classes - 1; the null label is num_classes."""

    name = "label"
    draws = LABELS
    instead = "choose config.sample.classes"

    @classmethod
    def matches(cls, config: "Config") -> bool:
        return config.model.architecture == "dit"

    @classmethod
    def check_config(cls, config: "Config") -> None:
        data = config.data
        if data.text:
            raise UserError(
                "config.data.text needs config.model.architecture mmdit with config.model.text.encoder encoded"
            )
        if data.source in CAPTIONED_SOURCES or data.num_classes < 1:
            raise UserError(
                f"config.model.architecture dit needs labels; config.data.source {data.source} with "
                f"config.data.num_classes {data.num_classes} has none"
            )

    def wrap(self, source: Source) -> Source:
        return source

    @property
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"label": jax.ShapeDtypeStruct((), np.int32)}

    def from_batch(self, batch: dict) -> jax.Array:
        return batch["label"]

    @property
    def null(self) -> np.ndarray:
        return np.asarray(self.config.data.num_classes, np.int32)

    @property
    def model_fields(self) -> dict:
        return {"num_classes": self.config.data.num_classes}

    def encode(self, wanted: Sequence[int]) -> np.ndarray:
        return np.asarray(wanted, np.int32)

    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        if prompts:
            self.require(TEXTS, "--prompt")
        sample = self.config.sample
        classes = sample.classes or range(min(ROWS_SHOWN, self.config.data.num_classes))
        labels = np.repeat(self.encode(classes), sample.per_class)
        return SampleRequest(labels, {"labels": labels})
