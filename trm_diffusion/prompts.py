"""What a model is asked for: classes, or texts in the words that its run knows."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from trm_diffusion.build import Experiment
from trm_diffusion.config import Config
from trm_diffusion.data.base import Source
from trm_diffusion.data.sources import make_source
from trm_diffusion.data.texts import SyntheticTextSource, TokenizedSource
from trm_diffusion.errors import UserError
from trm_diffusion.models.text import Text
from trm_diffusion.models.tokenizer import SPECIAL_WORDS, Tokenizer, split
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.workdir import write_json

ROWS_SHOWN = 10  # of a grid when nothing says which classes or prompts
WORDS_FILE = "words.json"


class Request(NamedTuple):
    """What to draw: `per_class` images of each class or prompt, one after the other."""

    condition: Any  # [N, ...], see `Experiment.condition_of`
    captions: list[str] | None = None  # [N] prompts, where there are any

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
    """The records of the config in the form that its model reads. Raises UserError for too many words."""
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

    Says which words of the prompts the run does not know. Raises UserError for prompts to a model that reads no words.
    """
    config = experiment.config
    if config.model.reads_words:
        return _texts(config, load_words(workdir), prompts)
    if prompts:
        raise UserError(
            f"--prompt needs a model that reads words; this one (config.model.architecture {config.model.architecture}"
            ") does not" + ("; choose config.sample.classes" if config.model.architecture == "dit" else "")
        )
    if config.model.architecture == "dit":
        classes = config.sample.classes or range(min(ROWS_SHOWN, config.data.num_classes))
        return Request(np.repeat(np.asarray(classes, np.int32), config.sample.per_class))
    source = training_source(config)
    records = [source[index] for index in range(min(ROWS_SHOWN, len(source))) for _ in range(config.sample.per_class)]
    return Request(experiment.condition_of({name: np.stack([r[name] for r in records]) for name in records[0]}))


def _texts(config: Config, words: Words, prompts: Sequence[str]) -> Request:
    tokenizer = Tokenizer(words.vocabulary, config.model.text.length)
    for prompt in prompts:
        if unknown := tokenizer.unknown_words(prompt):
            named = ", ".join(f'"{word}"' for word in unknown)
            say(f'warning: this run knows no word {named} (in "{prompt}"); known are {" ".join(words.vocabulary)}')
        if len(split(prompt)) >= tokenizer.length:
            say(f'warning: only the first {tokenizer.length - 1} words of "{prompt}" are read')
    captions = [text for text in prompts or words.captions for _ in range(config.sample.per_class)]
    return Request(np.stack([tokenizer.encode(caption) for caption in captions]), captions)


def read_prompts(path: str) -> list[str]:
    """The lines of a file, without the empty ones. Raises UserError where there are none."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"--prompts={path}: no such file; it holds one prompt a line")
    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={path} is empty; it holds one prompt a line")
    return prompts
