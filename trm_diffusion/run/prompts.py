"""What a model is asked for: classes, or texts, in the words that its run knows or as pretrained encoders see them."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from trm_diffusion.config import Config
from trm_diffusion.data.base import Source
from trm_diffusion.data.encodings import open_encodings
from trm_diffusion.data.sources import make_source
from trm_diffusion.data.text_encoders import PretrainedEncoder
from trm_diffusion.data.texts import EncodedTextSource, SyntheticTextSource, TokenizedSource
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import write_json
from trm_diffusion.metrics import dpg
from trm_diffusion.metrics.exports import read_json_lines
from trm_diffusion.models.text import Text
from trm_diffusion.models.tokenizer import SPECIAL_WORDS, Tokenizer, split
from trm_diffusion.runtime.logging import say

ROWS_SHOWN = 10  # of a grid when nothing says which classes or prompts
WORDS_FILE, ENCODING_FILE = "words.json", "text.json"  # of a workdir


class Request(NamedTuple):
    """What to draw: `per_class` images of each class or prompt, one after the other."""

    condition: Any  # [N, ...], see `Experiment.condition_of`
    captions: list[str] | None = None  # [N] prompts, where there are any
    null_text: Text | None = None  # of the experiment that draws them

    def arrays(self) -> dict[str, np.ndarray]:
        """What was asked for, by name, to be kept beside the images."""
        if self.captions is not None:
            return {"prompts": np.array(self.captions)}
        return self.condition._asdict() if isinstance(self.condition, Text) else {"labels": self.condition}


class Words(NamedTuple):
    """What a run knows of its captions, kept in its workdir."""

    vocabulary: tuple[str, ...]
    captions: tuple[str, ...]  # a few of its data, for the grids


def training_source(config: Config) -> Source:
    """The records of the config in the form that its model reads.

    Raises UserError for too many words, or encodings that are missing or of other images.
    """
    source, model = make_source(config.data), config.model
    if model.architecture == "dit":
        return source
    if model.reads_words:
        if not source.vocabulary:
            raise UserError(
                f"config.data.source {config.data.source} has captions of open text; "
                "config.model.text.encoder learned needs a closed vocabulary, such as that of scenes"
            )
        needed = len(source.vocabulary) + len(SPECIAL_WORDS)
        if needed > model.text.vocabulary:
            raise UserError(
                f"config.model.text.vocabulary is {model.text.vocabulary}; the captions of config.data.source "
                f"{config.data.source} have {len(source.vocabulary)} words, which with {len(SPECIAL_WORDS)} special "
                f"ones need {needed} rows"
            )
        return TokenizedSource(source, Tokenizer(source.vocabulary, model.text.length))
    text = model.text
    if config.data.text:
        return EncodedTextSource(source, open_encodings(config.data.text, text))
    if config.data.source != "synthetic":
        raise UserError(
            f"config.model.text.encoder encoded needs encoded text; encode the captions of config.data.source "
            f"{config.data.source} by --mode=encode --out=DIR and give config.data.text=DIR"
        )
    return SyntheticTextSource(source, length=text.length, features=text.features, pooled_features=text.pooled_features)


def keep_words(config: Config, workdir: epath.Path) -> None:
    """Writes the vocabulary and some captions of the data to the workdir of a run that reads words.

    Raises UserError if the words are not those that the run, or the one it starts from, began with.
    """
    if not config.model.reads_words:
        return
    source = make_source(config.data)
    for run in filter(None, (workdir, config.init.workdir)):
        kept = epath.Path(run) / WORDS_FILE
        if kept.exists() and load_words(kept.parent).vocabulary != source.vocabulary:
            raise UserError(
                f"{kept} holds other words than config.data.source {config.data.source}; use the data of that run, "
                "or another --workdir"
            )
    path = workdir / WORDS_FILE
    captions = [str(source[index]["caption"]) for index in range(min(ROWS_SHOWN, len(source)))]
    if jax.process_index() == 0 and not path.exists():
        write_json(path, {"vocabulary": source.vocabulary, "captions": captions})


def load_words(workdir: epath.Path) -> Words:
    path = workdir / WORDS_FILE
    if not path.exists():
        raise UserError(f"{workdir} holds no {WORDS_FILE}; train first, or give the right --workdir")
    record = json.loads(path.read_text())
    return Words(tuple(record["vocabulary"]), tuple(record["captions"]))


def request_of(experiment: Experiment, workdir: epath.Path, prompts: Sequence[str] = ()) -> Request:
    """The prompts given; else the classes of the config, or captions of the run's own data.

    Says which words of the prompts the run does not know. Raises UserError for prompts to a model of labels, or to one
    whose texts nothing encodes.
    """
    config = experiment.config
    if config.model.architecture == "dit":
        if prompts:
            raise UserError(
                "--prompt needs a model that reads words; this one (config.model.architecture dit) does not; choose "
                "config.sample.classes"
            )
        classes = config.sample.classes or range(min(ROWS_SHOWN, config.data.num_classes))
        return Request(np.repeat(np.asarray(classes, np.int32), config.sample.per_class))
    if config.model.reads_words or config.data.text or prompts:
        reader = text_reader(config, workdir)
        for prompt in prompts:
            if problem := reader.problem(prompt):
                say(f"warning: {problem}")
        texts = prompts or reader.captions
        rows = np.repeat(np.arange(len(texts)), config.sample.per_class)
        condition = jax.tree.map(lambda leaf: leaf[rows], reader(texts))
        return Request(condition, [texts[row] for row in rows], reader.null_text)
    source = training_source(config)
    records = [source[index] for index in range(min(ROWS_SHOWN, len(source))) for _ in range(config.sample.per_class)]
    return Request(experiment.condition_of({name: np.stack([r[name] for r in records]) for name in records[0]}))


def text_reader(config: Config, workdir: epath.Path) -> "WordReader | EncodedReader":
    """What makes a condition of texts, for the run in `workdir`."""
    return (WordReader if config.model.reads_words else EncodedReader)(config, workdir)


class WordReader:
    """Texts -> word ids [N, L], in the words that a run knows.

    captions: some of its data, for the grids.
    """

    null_text, encoding = None, None

    def __init__(self, config: Config, workdir: epath.Path):
        words = load_words(workdir)
        self._tokenizer, self.captions = Tokenizer(words.vocabulary, config.model.text.length), words.captions

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._tokenizer.encode(text) for text in texts])

    def problem(self, text: str) -> str:
        """What of a text is not read, in words for a person, or ""."""
        if unknown := self._tokenizer.unknown_words(text):
            named, known = ", ".join(f'"{word}"' for word in unknown), " ".join(self._tokenizer.words)
            return f'this run knows no word {named} (in "{text}"); known are {known}'
        length = self._tokenizer.length
        return f'only the first {length - 1} words of "{text}" are read' if len(split(text)) >= length else ""


class EncodedReader:
    """Texts -> `Text` [N, ...], NumPy: out of `config.data.text` where it has them, else by pretrained encoders.

    captions: some of `config.data.text`, for the grids; null_text: the empty text; encoding: see `PretrainedEncoder`.

    Raises UserError where there is neither, and for encodings that are not those of the config, or of the run in
    `workdir` or the one it starts from.
    """

    def __init__(self, config: Config, workdir: epath.Path):
        self._config, self._workdir = config, workdir
        self._encodings, self._encoder, self.captions = None, None, ()
        if config.data.text:
            found = self._encodings = open_encodings(config.data.text, config.model.text)
            check_encoding(config, found.encoding, workdir)
            self.captions = [found.caption(found.records_of(i)[0]) for i in range(min(ROWS_SHOWN, len(found)))]
            self.null_text, self.encoding = found.null, found.encoding
        else:
            self.null_text = Text(*(leaf[0] for leaf in self._encode([""])))
            self.encoding = self._encoder.encoding

    def __call__(self, texts: Sequence[str]) -> Text:
        records = [None if self._encodings is None else self._encodings.find(text) for text in texts]
        missing = [text for text, record in zip(texts, records, strict=True) if record is None]
        encoded = iter(zip(*self._encode(missing), strict=True)) if missing else None
        each = [next(encoded) if record is None else self._encodings[record] for record in records]
        return Text(*(np.stack(leaves) for leaves in zip(*each, strict=True)))

    def problem(self, text: str) -> str:
        return ""  # what is too long is cut by the encoders' own tokenizers, each at another place

    def _encode(self, texts: list[str]) -> Text:
        if not self._config.model.text.pretrained:
            directory = self._config.data.text
            raise UserError(
                (f'config.data.text={directory} has no "{texts[0]}"' if directory else "this model reads encoded text")
                + ": encode prompts by --mode=encode --prompts=FILE --out=DIR and give config.data.text=DIR, or name "
                "the encoders in config.model.text.pretrained"
            )
        if self._encoder is None:
            self._encoder = PretrainedEncoder(self._config.model.text)
            check_encoding(self._config, self._encoder.encoding, self._workdir)
        return self._encoder(texts)


def check_encoding(config: Config, encoding: dict, workdir: epath.Path) -> None:
    """Raises UserError where texts are encoded otherwise than for the run in `workdir`, or the one it starts from."""
    for run in filter(None, (workdir, config.init.workdir)):
        path = epath.Path(run) / ENCODING_FILE
        kept = json.loads(path.read_text()) if path.exists() else encoding
        changed = [field for field in encoding if kept.get(field) != encoding[field]]
        if changed:
            field = changed[0]
            values = "" if field == "encoders" else f" {encoding[field]!r}, not {kept.get(field)!r}"
            raise UserError(
                f"texts are encoded with other {field}{values} than those of the run in {run} ({path.name}); use the "
                "same throughout"
            )


def keep_encoding(source: Source, workdir: epath.Path) -> None:
    """Writes what encodes the texts of a run, and where that came from, to its workdir."""
    if source.encodings is not None and jax.process_index() == 0:
        write_json(workdir / ENCODING_FILE, source.encodings.preparation | source.encodings.encoding)


def read_prompts(path: str) -> list[str]:
    """The prompts in a file, one a line, or a JSON object with "prompt" a line (.jsonl), or in a folder of .txt files.

    Raises UserError where there are none.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"--prompts={path}: no such file; it holds one prompt a line")
    if file.is_dir():
        return list(dpg.read_prompts(path).values())
    if file.suffix == ".jsonl":
        prompts = [record["prompt"] for record in read_json_lines(path, ("prompt",))]
    else:
        prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--prompts={path} is empty, or not all text; it holds one prompt a line")
    return prompts
