"""An image as a condition, joined to the noisy image along channels, beside another kind of condition.

That kind is a class label for a DiT and a text for an MMDiT. The text of records without captions is the null: of
encoded text with `config.data.text` the encoded empty text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.conditions import kinds
from trm_diffusion.conditions.base import (
    CONTEXTS,
    DATA,
    LABELS,
    PROMPTS,
    ROWS_SHOWN,
    TEXTS,
    Condition,
    SampleRequest,
)
from trm_diffusion.data.base import Element, Source
from trm_diffusion.data.contexts import read_contexts
from trm_diffusion.data.sources import CAPTIONED_SOURCES, CONTEXT_SOURCES
from trm_diffusion.data.texts import ConditionedSource
from trm_diffusion.errors import UserError

if TYPE_CHECKING:
    from trm_diffusion.config import Config


class Context(NamedTuple):
    context: jax.Array  # float32 [B, H, W, C'], in [-1, 1]
    beside: Any  # the condition of the other kind; labels are all 0 in data without them


class NullTextSource(ConditionedSource):
    """Records whose text is the null; arrays: its arrays by name, without the batch axis."""

    def __init__(self, source: Source, arrays: Element):
        super().__init__(source)
        self._arrays = arrays

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        return self._arrays


class ContextTextSource(ConditionedSource):
    """Records of a source with context images, each with the arrays that `texts` has for the same record."""

    mirrored = ("image", "context")

    def __init__(self, source: Source, texts: ConditionedSource):
        super().__init__(source)
        self.stochastic, self.in_memory = texts.stochastic, texts.in_memory
        self._texts = texts

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        return {"context": element["context"]} | self._texts.condition(element, rng)


class ContextImage(Condition):
    """`Context`; an image of zeros stands for none, and both parts are dropped together."""

    name = "context image"
    draws = CONTEXTS
    instead = "give images with --context=FILE_OR_FOLDER"

    def __init__(self, config: "Config", workdir: epath.Path | None = None, reads: str = DATA):
        super().__init__(config, workdir, reads)
        kind, captioned = _kind_beside(config), config.data.source in CAPTIONED_SOURCES
        # The entry of a record that the other kind encodes; "" if it has none.
        self._entry = "label" if kind.draws == LABELS else "caption" if captioned else ""
        # Without captions there is no prompt to encode, and the null must be that of training.
        self._beside = kind(config, workdir, reads if self._entry or reads != PROMPTS else DATA)

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
        if data.num_classes < 1 and data.source not in CAPTIONED_SOURCES:
            raise UserError(
                "config.data.num_classes is 0; it is 1 for context images without labels (config.data.context_channels)"
            )
        _kind_beside(config).check_config(config)

    def wrap(self, source: Source) -> Source:
        if self._entry == "label":
            return source
        if self._entry == "caption":
            return ContextTextSource(source, self._beside.wrap(source))
        arrays = dict(zip(self._beside.record_shapes, jax.tree.leaves(self._beside.null), strict=True))
        return ContextTextSource(source, NullTextSource(source, arrays))

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
        """The condition of these records of the data: their "context", and their "label" or "caption" if it is read."""
        contexts = np.stack([record["context"] for record in wanted])
        return self._join(contexts, [record[self._entry] for record in wanted] if self._entry else ())

    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        if prompts:
            self.require(TEXTS, "--prompt")
        source = self.source()
        records = [source[index] for index in range(min(ROWS_SHOWN, len(source)))]
        return self._request(self.from_batch({name: np.stack([one[name] for one in records]) for name in records[0]}))

    def request_context(self, path: str, prompts: Sequence[str] = ()) -> SampleRequest:
        data, sample = self.config.data, self.config.sample
        if prompts and self._entry != "caption":
            self.require(TEXTS, "--prompt")
        contexts, names = read_contexts(path, size=data.image_size, channels=data.context_channels)
        given, what = prompts, f"{len(prompts)} prompts are given"
        if self._entry == "label":
            given = sample.classes or ((0,) if data.num_classes == 1 else ())
            what = f"config.sample.classes has {len(given)} labels"
        if (given or self._entry == "label") and len(given) not in (1, len(contexts)):
            raise UserError(
                f"{what} for the {len(contexts)} images of --context={path}; give one for all, or one for each"
            )
        each = [given[index % len(given)] for index in range(len(contexts))] if given else ()
        if prompts:
            names = [f"{name}: {prompt}" for name, prompt in zip(names, each, strict=True)]
        return self._request(self._join(contexts, each), names)

    def check(self, source: Source) -> None:
        if self._entry or self.config.data.text:
            self._beside.check(source)

    def keep(self, source: Source) -> None:
        if self._entry or self.config.data.text:  # how texts are encoded, the empty one too
            self._beside.keep(source)

    def _join(self, contexts: np.ndarray, given: Sequence) -> Context:
        """Contexts [N, H, W, C'] with N labels or texts; without any, with the null."""
        if len(given):
            return Context(contexts, self._beside.encode(given))
        return Context(contexts, jax.tree.map(lambda leaf: np.stack([leaf] * len(contexts)), self._beside.null))

    def _request(self, condition: Context, names: Sequence[str] = ()) -> SampleRequest:
        """`sample.per_class` images of each context."""
        rows = np.repeat(np.arange(len(condition.context)), self.config.sample.per_class)
        condition = jax.tree.map(lambda leaf: leaf[rows], condition)
        captions = [names[row] for row in rows] if names else None
        arrays = {"context": condition.context} | ({"labels": condition.beside} if self._entry == "label" else {})
        return SampleRequest(condition, arrays, captions, above=condition.context)


def _kind_beside(config: "Config") -> type[Condition]:
    """The kind of condition that the config would describe without its context images."""
    return next(kind for kind in kinds() if kind is not ContextImage and kind.matches(config))
