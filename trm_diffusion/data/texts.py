"""Sources whose records carry what a model is conditioned on: word ids, or encoded text, in place of captions."""

import numpy as np

from trm_diffusion.data.base import Element, Source
from trm_diffusion.data.captions import CaptionFolderSource
from trm_diffusion.data.encodings import Encodings
from trm_diffusion.data.latents import LatentSource
from trm_diffusion.data.origins import first_few
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_names
from trm_diffusion.models.tokenizer import Tokenizer

_SYNTHETIC_TEXT_SEED = 20_232


class ConditionedSource(Source):
    """A source whose labels or captions are replaced by the arrays of `condition`."""

    def __init__(self, source: Source):
        self._source = source
        self.sample_shape, self.num_classes, self.spec = source.sample_shape, source.num_classes, source.spec
        self.stochastic, self.in_memory = source.stochastic, source.in_memory

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        """The arrays of one record, by name; `rng` is only given in training."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def files(self, index: int) -> list[str]:
        return self._source.files(index)

    def content(self, index: int) -> bytes:
        return self._source.content(index)

    def shard_hashes(self) -> dict[str, str]:
        return self._source.shard_hashes()

    def __getitem__(self, index: int) -> Element:
        return self._exchanged(self._source[index])

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        return self._exchanged(self._source.sample(index, rng), rng)

    def _exchanged(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        return {name: element[name] for name in ("image", "index")} | self.condition(element, rng)


class TokenizedSource(ConditionedSource):
    """Captions as word ids: "tokens" int32 [L]."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        super().__init__(source)
        self.vocabulary = source.vocabulary
        self._tokenizer = tokenizer

    def captions(self, index: int) -> list[str]:
        return self._source.captions(index)

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        return {"tokens": self._tokenizer.encode(str(element["caption"]))}


class SyntheticTextSource(ConditionedSource):
    """Standard normal noise in the form of encoded text; it depends only on the record's index.

    "states" float32 [L, C], "mask" bool [L], all True, and "pooled" float32 [P].
    """

    def __init__(self, source: Source, *, length: int, features: int, pooled_features: int):
        super().__init__(source)
        self._states, self._pooled = (length, features), (pooled_features,)

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        key = np.array([_SYNTHETIC_TEXT_SEED, int(element["index"])], np.uint64)
        noise = np.random.Generator(np.random.Philox(key=key))
        return {
            "states": noise.standard_normal(self._states, np.float32),
            "mask": np.ones(self._states[:1], bool),
            "pooled": noise.standard_normal(self._pooled, np.float32),
        }


class EncodedTextSource(ConditionedSource):
    """Captions as pretrained encoders see them: "states" float32 [L, C], "mask" bool [L], "pooled" float32 [P].

    Training draws one of an image's captions on each read; a plain read takes the first. Raises UserError if the
    encodings belong to other images than the source's.
    """

    def __init__(self, source: Source, encodings: Encodings):
        super().__init__(source)
        self.stochastic, self.in_memory = True, False
        self.encodings = encodings
        self._items = _items_of(source, encodings)

    def shard_hashes(self) -> dict[str, str]:
        return super().shard_hashes() | self.encodings.shard_hashes

    def condition(self, element: Element, rng: np.random.Generator | None = None) -> Element:
        records = self.encodings.records_of(self._items[element["index"]])
        return self.encodings[records[rng.integers(len(records)) if rng else 0]]._asdict()


def _items_of(source: Source, encodings: Encodings) -> np.ndarray:
    """The item of the encodings that holds the captions of each record, int [N]."""
    if isinstance(source, LatentSource):
        preparation, bad = source.preparation or {}, set(source.bad_images)
        names = preparation.get("names_sha256")
        items = [item for item, name in enumerate(encodings.names) if name not in bad]
        items = np.repeat(items, 2 if preparation.get("flip") else 1)
    else:
        names = sha256_of_names(source.name(index) for index in range(len(source)))
        items = np.arange(len(source))
    if names != encodings.preparation["names_sha256"] or len(items) != len(source):
        raise UserError(
            "config.data.text holds the texts of other images than config.data.path: run --mode=encode on the data "
            "that --mode=prepare has read"
        )
    if isinstance(source, CaptionFolderSource):
        _check_captions(source, encodings)
    return items


def _check_captions(source: CaptionFolderSource, encodings: Encodings) -> None:
    """Raises UserError if captions were edited after they were encoded."""
    edited = [
        source.name(index)
        for index in range(len(source))
        if source.captions(index) != [encodings.caption(record) for record in encodings.records_of(index)]
    ]
    if edited:
        raise UserError(
            f"config.data.text holds other captions than config.data.path for {first_few(edited)}: run --mode=encode "
            "into a new --out, or restore the captions"
        )
