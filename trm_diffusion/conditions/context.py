"""An image as a condition, joined to the noisy image along channels, beside another kind of condition.

That kind is a class label for a DiT and a text for an MMDiT. Records with a context image have no captions, so their
text is the null: of encoded text with `config.data.text` the encoded empty text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.conditions import kinds
from trm_diffusion.conditions.base import CONTEXTS, DATA, LABELS, ROWS_SHOWN, TEXTS, Condition, SampleRequest
from trm_diffusion.data.base import Element, Source
from trm_diffusion.data.contexts import read_contexts
from trm_diffusion.data.sources import CONTEXT_SOURCES, make_source
from trm_diffusion.data.texts import ConditionedSource
from trm_diffusion.errors import UserError

if TYPE_CHECKING:
    from trm_diffusion.config import Config


class Context(NamedTuple):
    context: jax.Array  # float32 [B, H, W, C'], in [-1, 1]
    beside: Any  # the condition of the other kind; labels are all 0 in data without them


class WithNull(ConditionedSource):
    """Records with a context image and without captions: every text is the null, `arrays`, without the batch axis."""

    mirrored = ("image", "context")

    def __init__(self, source: Source, arrays: Element):
        super().__init__(source)
        self._arrays = arrays

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        return {"context": element["context"]} | self._arrays


class ContextImage(Condition):
    """`Context`; an image of zeros stands for none, and both parts are dropped together."""

    name = "context image"
    draws = CONTEXTS
    instead = "give images with --context=FILE_OR_FOLDER"

    def __init__(self, config: "Config", workdir: epath.Path | None = None, reads: str = DATA):
        super().__init__(config, workdir, reads)
        self._beside = _kind_beside(config)(config, workdir, reads)

    @classmethod
    def matches(cls, config: "Config") -> bool:
        return config.data.context_channels > 0

    @classmethod
    def check_config(cls, config: "Config") -> None:
        data = config.data
        if data.source not in CONTEXT_SOURCES:
            raise UserError(
                f"config.data.context_channels {data.context_channels} needs context images: config.data.source one "
                f"of {', '.join(CONTEXT_SOURCES)}, not {data.source}"
            )
        if data.num_classes < 1:
            raise UserError(
                "config.data.num_classes is 0; it is 1 for context images without labels (config.data.context_channels)"
            )
        _kind_beside(config).check_config(config)

    def wrap(self, source: Source) -> Source:
        if self._has_labels:
            return source
        names = self._beside.record_shapes
        return WithNull(source, dict(zip(names, jax.tree.leaves(self._beside.null), strict=True)))

    @property
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        data = self.config.data
        shape = (data.image_size, data.image_size, data.context_channels)
        return {"context": jax.ShapeDtypeStruct(shape, np.float32), **self._beside.record_shapes}

    def from_batch(self, batch: dict) -> Context:
        return Context(batch["context"], self._beside.from_batch(batch))

    @property
    def null(self) -> Context:
        return Context(np.zeros(self.record_shapes["context"].shape, np.float32), self._beside.null)

    @property
    def input_channels(self) -> int:
        return self._beside.input_channels + self.config.data.context_channels

    @property
    def sharded_widths(self) -> tuple[int, ...]:
        return self._beside.sharded_widths

    @property
    def model_fields(self) -> dict:
        return self._beside.model_fields

    def apply(self, network, noisy: jax.Array, times: jax.Array, condition: Context, **options):
        joined = jnp.concatenate([noisy, condition.context.astype(noisy.dtype)], axis=-1)  # [B, H, W, C + C']
        return self._beside.apply(network, joined, times, condition.beside, **options)

    def encode(self, wanted: Sequence[Element]) -> Context:
        """The condition of these records of the data: their "context", and "label" if the model reads labels."""
        contexts = np.stack([record["context"] for record in wanted])
        return self._join(contexts, [record["label"] for record in wanted] if self._has_labels else ())

    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        if prompts:
            self.require(TEXTS, "--prompt")
        source = make_source(self.config.data)
        return self._request(self.encode([source[index] for index in range(min(ROWS_SHOWN, len(source)))]))

    def request_context(self, path: str) -> SampleRequest:
        data, sample = self.config.data, self.config.sample
        contexts, names = read_contexts(path, size=data.image_size, channels=data.context_channels)
        classes = sample.classes or ((0,) if data.num_classes == 1 else ())
        if self._has_labels and len(classes) not in (1, len(contexts)):
            raise UserError(
                f"config.sample.classes has {len(classes)} labels for the {len(contexts)} images of --context={path}; "
                "give one label for all, or one for each"
            )
        return self._request(self._join(contexts, np.resize(classes, len(contexts)) if self._has_labels else ()), names)

    def check(self, source: Source) -> None:
        if self.config.data.text:
            self._beside.check(source)

    def keep(self, source: Source) -> None:
        if self.config.data.text:  # how the empty text is encoded
            self._beside.keep(source)

    @property
    def _has_labels(self) -> bool:
        return self._beside.draws == LABELS

    def _join(self, contexts: np.ndarray, labels: Sequence[int]) -> Context:
        """Contexts [N, H, W, C'] with their labels, or with the null text."""
        if self._has_labels:
            return Context(contexts, self._beside.encode(labels))
        return Context(contexts, jax.tree.map(lambda leaf: np.stack([leaf] * len(contexts)), self._beside.null))

    def _request(self, condition: Context, names: Sequence[str] = ()) -> SampleRequest:
        """`sample.per_class` images of each context."""
        rows = np.repeat(np.arange(len(condition.context)), self.config.sample.per_class)
        condition = jax.tree.map(lambda leaf: leaf[rows], condition)
        captions = [names[row] for row in rows] if names else None
        arrays = {"context": condition.context} | ({"labels": condition.beside} if self._has_labels else {})
        return SampleRequest(condition, arrays, captions, above=condition.context)


def _kind_beside(config: "Config") -> type[Condition]:
    """The kind of condition that the config would describe without its context images."""
    return next(kind for kind in kinds() if kind is not ContextImage and kind.matches(config))
