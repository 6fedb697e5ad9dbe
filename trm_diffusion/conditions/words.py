"""Words of a closed vocabulary, read by a text encoder that is trained with the model."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from etils import epath

from trm_diffusion.conditions.base import ROWS_SHOWN
from trm_diffusion.conditions.text import TextCondition
from trm_diffusion.data.base import Source
from trm_diffusion.data.sources import CAPTIONED_SOURCES
from trm_diffusion.data.texts import TokenizedSource
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_names, write_json
from trm_diffusion.models.tokenizer import SPECIAL_WORDS, Tokenizer, null_tokens, split
from trm_diffusion.readers.records import read_json
from trm_diffusion.runtime.processes import is_main_process

if TYPE_CHECKING:
    from trm_diffusion.config import Config

WORDS_FILE = "words.json"  # in a run's directory


class RunWords(NamedTuple):
    """What a run saves about its captions."""

    vocabulary: tuple[str, ...]
    captions: tuple[str, ...]  # a few captions of its data, for the grids


class Words(TextCondition):
    """Word ids int32 [B, L]. The data define the vocabulary; a run saves it and tokenizes prompts with it."""

    name = "caption in words"

    @classmethod
    def matches(cls, config: "Config") -> bool:
        return config.model.architecture == "mmdit" and config.model.text.encoder == "learned"

    @classmethod
    def check_config(cls, config: "Config") -> None:
        text, source = config.model.text, config.data.source
        if config.data.text:
            raise UserError(
                "config.data.text needs config.model.architecture mmdit with config.model.text.encoder encoded"
            )
        if source not in CAPTIONED_SOURCES and not config.data.context_channels:
            raise UserError(
                f"config.model.text.encoder learned needs captions; config.data.source {source} has none: "
                f"choose one of {', '.join(CAPTIONED_SOURCES)}"
            )
        if text.features % text.heads or text.features % 2:
            raise UserError(
                f"config.model.text.features {text.features} must be even and a multiple of config.model.text.heads "
                f"{text.heads}"
            )
        mesh = config.mesh
        for field, value, axis, shards in (
            ("features", text.features, "fsdp", mesh.fsdp),
            ("heads", text.heads, "tensor", mesh.tensor),
        ):
            if value % max(1, shards):
                raise UserError(f"config.model.text.{field} {value} is not a multiple of config.mesh.{axis} {shards}")
        if text.features != text.pooled_features:
            raise UserError(
                f"config.model.text.pooled_features {text.pooled_features} must equal config.model.text.features "
                f"{text.features} with config.model.text.encoder learned"
            )
        super().check_config(config)

    def wrap(self, source: Source) -> Source:
        model, name = self.config.model, self.config.data.source
        if not source.vocabulary:
            raise UserError(
                f"config.data.source {name} has free-text captions; config.model.text.encoder learned needs a closed "
                "vocabulary, such as that of scenes"
            )
        needed = len(source.vocabulary) + len(SPECIAL_WORDS)
        if needed > model.text.vocabulary:
            raise UserError(
                f"config.model.text.vocabulary is {model.text.vocabulary}; the captions of config.data.source {name} "
                f"have {len(source.vocabulary)} words, which with {len(SPECIAL_WORDS)} special words need {needed} rows"
            )
        return TokenizedSource(source, Tokenizer(source.vocabulary, model.text.length))

    @property
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": jax.ShapeDtypeStruct((self.config.model.text.length,), np.int32)}

    def from_batch(self, batch: dict) -> jax.Array:
        return batch["tokens"]

    @property
    def null(self) -> np.ndarray:
        return null_tokens(self.config.model.text.length)

    @property
    def sharded_widths(self) -> tuple[int, ...]:
        return (self.config.model.width, self.config.model.text.features)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._tokenizer.encode(text) for text in texts])

    def encoding(self) -> dict:
        return {"words_sha256": sha256_of_names(self._words.vocabulary)}

    def shown_captions(self) -> Sequence[str]:
        return self._words.captions

    def problem(self, text: str) -> str:
        tokenizer = self._tokenizer
        if unknown := tokenizer.unknown_words(text):
            named, known = ", ".join(f'"{word}"' for word in unknown), " ".join(tokenizer.words)
            return f'this run knows no word {named} (in "{text}"); it knows {known}'
        return f'only the first {tokenizer.length - 1} words of "{text}" are read' if _is_cut(text, tokenizer) else ""

    def check(self, source: Source) -> None:
        for run in self.runs():
            if (run / WORDS_FILE).exists() and load_words(run).vocabulary != source.vocabulary:
                raise UserError(
                    f"{run / WORDS_FILE} holds other words than config.data.source {self.config.data.source}; use the "
                    "data of that run, or another --workdir"
                )

    def keep(self, source: Source) -> None:
        path = self.workdir / WORDS_FILE
        if is_main_process() and not path.exists():
            captions = [source.captions(index)[0] for index in range(min(ROWS_SHOWN, len(source)))]
            write_json(path, {"vocabulary": source.vocabulary, "captions": captions})

    @functools.cached_property
    def _words(self) -> RunWords:
        return load_words(self.workdir)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer with the run's vocabulary."""
        return Tokenizer(self._words.vocabulary, self.config.model.text.length)


def _is_cut(text: str, tokenizer: Tokenizer) -> bool:
    return len(split(text)) >= tokenizer.length


def load_words(workdir: epath.Path) -> RunWords:
    path = workdir / WORDS_FILE
    if not path.exists():
        raise UserError(f"{workdir} holds no {WORDS_FILE}; train first, or give the right --workdir")
    record = read_json(path, {"vocabulary": [str], "captions": [str]})
    return RunWords(tuple(record["vocabulary"]), tuple(record["captions"]))
