"""Text encoded by pretrained encoders, either beforehand (data/encodings.py) or when prompts are given.

Encodings come from, in this order:
    1. `config.data.text`, a directory of encoded captions or prompts, which also holds the encoded empty text;
    2. the encoders that `config.model.text.pretrained` names, for prompts that the directory lacks, or for all prompts
       if there is no directory;
    3. for synthetic data without a directory: noise in the form of encoded text, with a null of zeros.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from trm_diffusion.conditions.base import NOTHING, PROMPTS, ROWS_SHOWN, SampleRequest
from trm_diffusion.conditions.text import TextCondition
from trm_diffusion.data.base import Source
from trm_diffusion.data.encodings import Encodings, open_encodings
from trm_diffusion.data.sources import CAPTIONED_SOURCES
from trm_diffusion.data.text_encoders import PretrainedEncoder
from trm_diffusion.data.texts import EncodedTextSource, SyntheticTextSource
from trm_diffusion.errors import UserError
from trm_diffusion.files import write_json
from trm_diffusion.models.text import CLIP_LENGTH, Text
from trm_diffusion.readers.records import read_json
from trm_diffusion.runtime.processes import is_main_process

if TYPE_CHECKING:
    from trm_diffusion.config import Config

ENCODING_FILE = "text.json"  # in a run's directory
SOURCES = ("synthetic", "latents", *CAPTIONED_SOURCES)


class EncodedText(TextCondition):
    """`Text`: states float32 [B, L, C], mask bool [B, L] and pooled float32 [B, P]; the null is the empty text."""

    name = "caption encoded beforehand"

    @classmethod
    def matches(cls, config: "Config") -> bool:
        return config.model.architecture == "mmdit" and config.model.text.encoder == "encoded"

    @classmethod
    def check_config(cls, config: "Config") -> None:
        text, source = config.model.text, config.data.source
        if source not in SOURCES and not config.data.context_channels:
            raise UserError(
                f"config.data.source is {source}, images without captions; config.model.text.encoder encoded needs "
                f"encoded text: choose one of {', '.join(SOURCES)}"
            )
        if text.recipe == "sd3" and text.length <= CLIP_LENGTH and (text.pretrained or config.data.text):
            raise UserError(
                f"config.model.text.length is {text.length}; config.model.text.recipe sd3 needs more than the "
                f"{CLIP_LENGTH} tokens of the CLIP encoders, for the tokens of T5"
            )
        super().check_config(config)

    def wrap(self, source: Source) -> Source:
        data, text = self.config.data, self.config.model.text
        if data.text:
            return EncodedTextSource(source, self._encodings)
        if data.source != "synthetic":
            raise UserError(
                f"config.model.text.encoder encoded needs encoded text; encode the captions of config.data.source "
                f"{data.source} with --mode=encode --out=DIR and give config.data.text=DIR"
            )
        sizes = dict(length=text.length, features=text.features, pooled_features=text.pooled_features)
        return SyntheticTextSource(source, **sizes)

    @property
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        text = self.config.model.text
        return {
            "states": jax.ShapeDtypeStruct((text.length, text.features), np.float32),
            "mask": jax.ShapeDtypeStruct((text.length,), np.bool_),
            "pooled": jax.ShapeDtypeStruct((text.pooled_features,), np.float32),
        }

    def from_batch(self, batch: dict) -> Text:
        return Text(*(batch[name] for name in Text._fields))

    @functools.cached_property
    def null(self) -> Text:
        if self.config.data.text and self.reads != NOTHING:
            return self._encodings.null
        if self.reads == PROMPTS:
            return Text(*(leaf[0] for leaf in self._encode([""])))
        shapes = self.record_shapes
        return Text(
            np.zeros(shapes["states"].shape, np.float32),
            np.ones(shapes["mask"].shape, bool),
            np.zeros(shapes["pooled"].shape, np.float32),
        )

    def encode(self, texts: Sequence[str]) -> Text:
        encodings = self._encodings
        if encodings is None and self.reads != PROMPTS:
            raise ValueError("prompts need a condition that reads PROMPTS, so that its null is encoded in the same way")
        records = [None if encodings is None else encodings.find(text) for text in texts]
        missing = [text for text, record in zip(texts, records, strict=True) if record is None]
        encoded = iter(zip(*self._encode(missing), strict=True)) if missing else None
        each = [next(encoded) if record is None else encodings[record] for record in records]
        return Text(*(np.stack(leaves) for leaves in zip(*each, strict=True)))

    def shown_captions(self) -> Sequence[str]:
        found = self._encodings
        return [found.caption(found.records_of(i)[0]) for i in range(min(ROWS_SHOWN, len(found)))]

    def encoding(self) -> dict:
        found = self._encodings
        return (self._encoder if found is None else found).encoding

    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        if prompts or self.config.data.text:
            return super().request(prompts)
        source, each = self.source(), self.config.sample.per_class
        records = [source[index] for index in range(min(ROWS_SHOWN, len(source))) for _ in range(each)]
        condition = self.from_batch({name: np.stack([record[name] for record in records]) for name in records[0]})
        return SampleRequest(condition, condition._asdict())

    def check(self, source: Source) -> None:
        del source
        _ = self._encodings  # opening it checks it

    def keep(self, source: Source) -> None:
        del source
        if self.config.data.text and is_main_process():
            write_json(self.workdir / ENCODING_FILE, self._encodings.preparation | self._encodings.encoding)

    @functools.cached_property
    def _encodings(self) -> Encodings | None:
        """The encodings in `config.data.text`. Raises UserError if they do not match the config or the run."""
        if not self.config.data.text:
            return None
        found = open_encodings(self.config.data.text, self.config.model.text)
        self._check_encoding(found.encoding)
        return found

    @functools.cached_property
    def _encoder(self) -> PretrainedEncoder:
        """The encoders of the config. Raises UserError if it names none, or others than the run's."""
        if not self.config.model.text.pretrained:
            raise _no_encoders("this model reads encoded text")
        encoder = PretrainedEncoder(self.config.model.text)
        self._check_encoding(encoder.encoding)
        return encoder

    def _encode(self, texts: list[str]) -> Text:
        directory = self.config.data.text
        if directory and not self.config.model.text.pretrained:
            raise _no_encoders(f'config.data.text={directory} has no "{texts[0]}"')
        return self._encoder(texts)

    def _check_encoding(self, encoding: dict) -> None:
        """Raises UserError if the run, or the run it starts from, has its texts encoded differently."""
        for run in self.runs():
            path = run / ENCODING_FILE
            kept = read_json(path) if path.exists() else encoding
            changed = [field for field in encoding if kept.get(field) != encoding[field]]
            if changed:
                field = changed[0]
                values = "" if field == "encoders" else f" {encoding[field]!r}, not {kept.get(field)!r}"
                raise UserError(
                    f"texts are encoded with other {field}{values} than those of the run in {run} ({path.name}); use "
                    "the same for training and sampling"
                )


def _no_encoders(reason: str) -> UserError:
    return UserError(
        f"{reason}: encode prompts with --mode=encode --prompts=FILE --out=DIR and give config.data.text=DIR, or name "
        "the encoders in config.model.text.pretrained"
    )
