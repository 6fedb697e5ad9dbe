"""Sources whose records carry text in the form that a model reads: word ids, or encoded text."""

import numpy as np

from trm_diffusion.data.base import Element, Source
from trm_diffusion.models.tokenizer import Tokenizer

_SYNTHETIC_TEXT_SEED = 20_232


class _WithText(Source):
    """A source with its labels or captions exchanged for the arrays of `text`."""

    def __init__(self, source: Source):
        self._source = source
        self.sample_shape, self.num_classes = source.sample_shape, source.num_classes
        self.stochastic, self.in_memory = source.stochastic, source.in_memory

    def text(self, element: Element) -> Element:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Element:
        return self._exchanged(self._source[index])

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        return self._exchanged(self._source.sample(index, rng))

    def _exchanged(self, element: Element) -> Element:
        return {name: element[name] for name in ("image", "index")} | self.text(element)


class TokenizedSource(_WithText):
    """Captions as word ids: "tokens" int32 [L]."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        super().__init__(source)
        self._tokenizer = tokenizer

    def text(self, element: Element) -> Element:
        return {"tokens": self._tokenizer.encode(str(element["caption"]))}


class SyntheticTextSource(_WithText):
    """Standard normal noise in the form of encoded text, depending on the record's index alone.

    "states" float32 [L, C], "mask" bool [L], all True, and "pooled" float32 [P].
    """

    def __init__(self, source: Source, *, length: int, features: int, pooled_features: int):
        super().__init__(source)
        self._states, self._pooled = (length, features), (pooled_features,)

    def text(self, element: Element) -> Element:
        key = np.array([_SYNTHETIC_TEXT_SEED, int(element["index"])], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        return {
            "states": rng.standard_normal(self._states, np.float32),
            "mask": np.ones(self._states[:1], bool),
            "pooled": rng.standard_normal(self._pooled, np.float32),
        }
