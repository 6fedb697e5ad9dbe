"""What both kinds of text conditions of an MMDiT share."""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from trm_diffusion.conditions.base import TEXTS, Condition, SampleRequest
from trm_diffusion.errors import UserError
from trm_diffusion.runtime.logging import say

if TYPE_CHECKING:
    from trm_diffusion.config import Config

# Fields of `models.mmdit.JointConfig` that a weights manifest stores.
JOINT_FIELDS = ("dual_attention_blocks", "position_max_size", "position_base_size")


class TextCondition(Condition):
    """A condition that is encoded from texts."""

    draws = TEXTS
    instead = "give texts with --prompt or --prompts=FILE"

    @classmethod
    def check_config(cls, config: "Config") -> None:
        model = config.model
        if model.mmdit.dual_attention_blocks > model.depth:
            raise UserError(
                f"config.model.mmdit.dual_attention_blocks {model.mmdit.dual_attention_blocks} exceeds "
                f"config.model.depth {model.depth}"
            )
        grid = config.data.image_size // model.patch
        if grid > model.mmdit.position_max_size:
            raise UserError(
                f"config.model.mmdit.position_max_size {model.mmdit.position_max_size} is less than the {grid} tokens "
                "a side that config.data.image_size and config.model.patch give"
            )

    @property
    def model_fields(self) -> dict:
        model = self.config.model
        fields = {name: getattr(model.mmdit, name) for name in JOINT_FIELDS} | {"qk_norm": model.qk_norm}
        return fields | {"text_features": model.text.features, "pooled_features": model.text.pooled_features}

    @abc.abstractmethod
    def shown_captions(self) -> Sequence[str]:
        """A few captions of the run's own data, for its grids."""

    def problem(self, text: str) -> str:
        """A message about what the model cannot read of a text, or ""."""
        del text
        return ""

    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        for prompt in prompts:
            if problem := self.problem(prompt):
                say(f"warning: {problem}")
        texts = prompts or self.shown_captions()
        rows = np.repeat(np.arange(len(texts)), self.config.sample.per_class)
        condition = jax.tree.map(lambda leaf: leaf[rows], self.encode(texts))
        captions = [texts[row] for row in rows]
        return SampleRequest(condition, {"prompts": np.array(captions)}, captions)
