"""An image as a condition, joined to the noisy image along channels, and class labels beside it, for a DiT."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trm_diffusion.conditions.base import CONTEXTS, ROWS_SHOWN, TEXTS, Condition, SampleRequest
from trm_diffusion.conditions.labels import Labels
from trm_diffusion.data.base import Element, Source
from trm_diffusion.data.contexts import read_contexts
from trm_diffusion.data.sources import CONTEXT_SOURCES
from trm_diffusion.errors import UserError

if TYPE_CHECKING:
    from trm_diffusion.config import Config


class Context(NamedTuple):
    context: jax.Array  # float32 [B, H, W, C'], in [-1, 1]
    label: jax.Array  # int32 [B], 0 .. num_classes - 1; all 0 in data without labels


class ContextImage(Condition):
    """`Context`; an image of zeros with the label num_classes stands for none, so both are dropped together."""

    name = "context image"
    draws = CONTEXTS
    instead = "give images with --context=FILE_OR_FOLDER"

    @classmethod
    def matches(cls, config: "Config") -> bool:
        return config.data.context_channels > 0

    @classmethod
    def check_config(cls, config: "Config") -> None:
        data = config.data
        if config.model.architecture != "dit":
            raise UserError(
                f"config.data.context_channels {data.context_channels} is for config.model.architecture dit, not "
                f"{config.model.architecture}"
            )
        if data.source not in CONTEXT_SOURCES:
            raise UserError(
                f"config.data.context_channels {data.context_channels} needs context images: config.data.source one "
                f"of {', '.join(CONTEXT_SOURCES)}, not {data.source}"
            )
        if data.num_classes < 1:
            raise UserError(
                "config.data.num_classes is 0; it is 1 for context images without labels (config.data.context_channels)"
            )
        Labels.check_config(config)

    def wrap(self, source: Source) -> Source:
        return source

    @property
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        data = self.config.data
        shape = (data.image_size, data.image_size, data.context_channels)
        return {"context": jax.ShapeDtypeStruct(shape, np.float32), "label": jax.ShapeDtypeStruct((), np.int32)}

    def from_batch(self, batch: dict) -> Context:
        return Context(batch["context"], batch["label"])

    @property
    def null(self) -> Context:
        shape = self.record_shapes["context"].shape
        return Context(np.zeros(shape, np.float32), np.asarray(self.config.data.num_classes, np.int32))

    @property
    def input_channels(self) -> int:
        return self.config.data.channels + self.config.data.context_channels

    @property
    def model_fields(self) -> dict:
        return {"num_classes": self.config.data.num_classes}

    def apply(self, network, noisy: jax.Array, times: jax.Array, condition: Context, **options):
        joined = jnp.concatenate([noisy, condition.context.astype(noisy.dtype)], axis=-1)  # [B, H, W, C + C']
        return network(joined, times, condition.label, **options)

    def encode(self, wanted: Sequence[Element]) -> Context:
        """The condition of these records of the data: their "context" and "label"."""
        return Context(*(np.stack([record[name] for record in wanted]) for name in Context._fields))

    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        if prompts:
            self.require(TEXTS, "--prompt")
        source = self.source()
        return self._request(self.encode([source[index] for index in range(min(ROWS_SHOWN, len(source)))]))

    def request_context(self, path: str) -> SampleRequest:
        data, sample = self.config.data, self.config.sample
        contexts, names = read_contexts(path, size=data.image_size, channels=data.context_channels)
        classes = sample.classes or ((0,) if data.num_classes == 1 else ())
        if len(classes) not in (1, len(contexts)):
            raise UserError(
                f"config.sample.classes has {len(classes)} labels for the {len(contexts)} images of --context={path}; "
                "give one label for all, or one for each"
            )
        labels = np.resize(np.asarray(classes, np.int32), len(contexts))
        return self._request(Context(contexts, labels), names)

    def _request(self, condition: Context, names: Sequence[str] = ()) -> SampleRequest:
        """`sample.per_class` images of each context."""
        rows = np.repeat(np.arange(len(condition.label)), self.config.sample.per_class)
        condition = jax.tree.map(lambda leaf: leaf[rows], condition)
        captions = [names[row] for row in rows] if names else None
        arrays = {"context": condition.context, "labels": condition.label}
        return SampleRequest(condition, arrays, captions, above=condition.context)
