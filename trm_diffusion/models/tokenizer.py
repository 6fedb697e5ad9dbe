"""A tokenizer for a small, closed vocabulary, which a run stores beside its parameters."""

import re
from collections.abc import Sequence

import numpy as np

PAD, UNKNOWN, END = 0, 1, 2  # ids of the special words; every text ends with END, including the empty one
SPECIAL_WORDS = ("<pad>", "<unknown>", "<end>")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")  # punctuation is dropped


class Tokenizer:
    """Maps the lower-case words of a text to ids [length], ended by END and padded with PAD.

    words: the vocabulary without the special words, whose ids come first. A text of more than length - 1 words is
    truncated.
    """

    def __init__(self, words: Sequence[str], length: int):
        self.words, self.length = tuple(words), length
        self._ids = {word: number for number, word in enumerate((*SPECIAL_WORDS, *self.words))}

    def __len__(self) -> int:
        return len(self._ids)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [length]."""
        ids = [self._ids.get(word, UNKNOWN) for word in split(text)][: self.length - 1]
        return np.pad(np.array([*ids, END], np.int32), (0, self.length - 1 - len(ids)), constant_values=PAD)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that are not in the vocabulary."""
        return [word for word in split(text) if word not in self._ids]


def split(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def null_tokens(length: int) -> np.ndarray:
    """The ids of the empty text, the null condition of classifier-free guidance, int32 [length]."""
    return Tokenizer((), length).encode("")
