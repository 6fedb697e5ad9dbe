"""Encoded text: the outputs of pretrained text encoders for each caption, computed once and read many times.

A directory holds shards (data/shards.py) and `manifest.json`, which is written last. The first item is the empty text,
the null condition of classifier-free guidance. The other items are prompts, or the images of a source with their
captions. One record is one caption: token states (float16 [L, C]), mask (uint8 [L]) and pooled (float32 [P]),
little-endian. The captions themselves are in the JSON files of the shards.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trm_diffusion.data.shards import LISTED_FIELDS, MANIFEST_NAME, SHARD_FORM, ShardFile, ShardReader, read_about
from trm_diffusion.errors import UserError
from trm_diffusion.models.text import Text, TextConfig
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import check, read_json

FORMAT_VERSION = 1
RECORD_FORM = SHARD_FORM | {  # of a shard's JSON record
    "sha256": str, "items": [(str, [str])], "encoding": dict, "preparation": dict
}  # fmt: skip
SIZES = ("length", "features", "pooled_features")  # L, C, P

MANIFEST_FORM = {
    "records": int, "items": int, "preparation": {"names_sha256": str}, "shards": [SHARD_FORM],
    "encoding": {size: int for size in SIZES},
}  # fmt: skip

_REMEDY = "encode the texts again with --mode=encode"


class Item(NamedTuple):
    """An image or a prompt: its name and its captions."""

    name: str
    captions: list[str]


NONE = Item("", [""])  # the first item of every directory


class EncodingWriter(ShardFile):
    """Writes one shard of encoded text.

    Args:
      directory: an existing directory.
      index: number of the shard.
      items: items of the shard; one record is written for each of their captions, in order.
      encoding, preparation: what determines the encoded values, and which texts these are; JSON, the same for all
        shards.
    """

    def __init__(self, directory: pathlib.Path, index: int, items: Sequence[Item], encoding: dict, preparation: dict):
        super().__init__(directory / shard_name(index))
        self._items, self._encoding, self._preparation = items, encoding, preparation

    def write(self, states_lc: np.ndarray, mask_l: np.ndarray, pooled_p: np.ndarray) -> None:
        """Appends one record. Raises UserError if a value does not fit in float16."""
        with np.errstate(over="ignore"):
            half = states_lc.astype("<f2")
        if not (np.isfinite(half).all() and np.isfinite(pooled_p).all()):
            raise UserError(
                f"{self.path}, record {self.records}: values are not finite in float16; "
                "try config.model.text.pretrained_dtype=float32"
            )
        self.append(half.tobytes() + mask_l.astype("u1").tobytes() + pooled_p.astype("<f4").tobytes())

    def about(self) -> dict:
        return {"items": self._items, "encoding": self._encoding, "preparation": self._preparation}


def shard_name(index: int) -> str:
    return f"texts-{index:05d}.array_record"


def read_shard_record(directory: pathlib.Path, index: int) -> dict | None:
    """The JSON record that `EncodingWriter` wrote for a shard, or None if it is incomplete or the shard is missing."""
    return read_about(directory / shard_name(index), RECORD_FORM)


def assemble_manifest(shards: list[dict]) -> dict:
    """The manifest of a directory, from the JSON records of all its shards in order."""
    return {
        "format_version": FORMAT_VERSION,
        "records": sum(shard["records"] for shard in shards),
        "items": sum(len(shard["items"]) for shard in shards),
        "encoding": shards[0]["encoding"],
        "preparation": shards[0]["preparation"],
        "shards": [{name: shard[name] for name in LISTED_FIELDS} for shard in shards],
    }


def read_manifest(directory: str) -> dict:
    """The validated manifest. Raises UserError if it is missing, damaged or of another format version."""
    path = local_path(directory, "config.data.text") / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"config.data.text={directory!r} has no {MANIFEST_NAME}: {_REMEDY}")
    manifest = read_json(path, {"format_version": int}, _REMEDY)
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: {_REMEDY}")
    check(manifest, MANIFEST_FORM, str(path), _REMEDY)
    return manifest


def decode_record(data: bytes, length: int, features: int, pooled_features: int) -> Text:
    """One caption: states float32 [L, C], mask bool [L], pooled float32 [P]. ValueError if the length is wrong."""
    states = 2 * length * features  # bytes
    mask = length
    if len(data) != states + mask + 4 * pooled_features:
        raise ValueError(f"is {len(data)} bytes long, which does not match the manifest")
    return Text(
        np.frombuffer(data[:states], "<f2").reshape(length, features).astype(np.float32),
        np.frombuffer(data[states : states + mask], "u1").astype(bool),
        np.frombuffer(data[states + mask :], "<f4").astype(np.float32),
    )


class Encodings:
    """Reads a directory of encoded texts. Picklable and thread-safe.

    Attributes:
      encoding: what determines the encoded values; see `PretrainedEncoder`.
      preparation: which texts these are, and where the encoders came from.
      names: names of the items, without the first, which is the empty text.
      shard_hashes: hash of each shard by its file name, as the manifest states it.

    Raises:
      UserError: the directory, the manifest or a shard is missing or damaged, or the format version differs.
    """

    def __init__(self, directory: str):
        manifest = read_manifest(directory)
        path = local_path(directory, "config.data.text") / MANIFEST_NAME
        shards, self.encoding, self.preparation = (manifest[name] for name in ("shards", "encoding", "preparation"))
        self._records = ShardReader(path.parent, shards, _REMEDY)
        self.shard_hashes = {shard["file"]: shard.get("sha256", "") for shard in shards}
        items = [Item(*item) for index in range(len(shards)) for item in _items(path.parent, index)]
        self.names = [item.name for item in items[1:]]
        self._captions = [caption for item in items for caption in item.captions]  # of each record
        self._firsts = np.cumsum([0, *(len(item.captions) for item in items)])  # record of each item's first caption
        if len(self._captions) != len(self._records) or self._captions[0] != "":
            raise UserError(f"{path} has {len(self._records)} records, {len(self._captions)} captions: {_REMEDY}")

    def __len__(self) -> int:
        """The number of items, without the empty text."""
        return len(self.names)

    def records_of(self, index: int) -> range:
        """The records of the captions of item `index`, where the items are counted without the empty text."""
        return range(self._firsts[index + 1], self._firsts[index + 2])

    def caption(self, record: int) -> str:
        return self._captions[record]

    def find(self, text: str) -> int | None:
        """A record of this text, or None."""
        return self._by_caption.get(text)

    @functools.cached_property
    def _by_caption(self) -> dict[str, int]:
        return {caption: record for record, caption in enumerate(self._captions)}

    @functools.cached_property
    def null(self) -> Text:
        """The encoded empty text."""
        return self[0]

    def __getitem__(self, record: int) -> Text:
        """One caption: states float32 [L, C], mask bool [L], pooled float32 [P]."""
        try:
            return decode_record(self._records[record], *(self.encoding[name] for name in SIZES))
        except ValueError as error:
            raise UserError(f"{self._records.where(record)} {error}: {_REMEDY}") from error

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_by_caption", "null")}


def _items(directory: pathlib.Path, index: int) -> list:
    about = read_shard_record(directory, index)
    if about is None:
        raise UserError(f"{directory / shard_name(index)} or its JSON file is missing or damaged: {_REMEDY}")
    return about["items"]


def open_encodings(directory: str, config: TextConfig) -> Encodings:
    """Opens the encodings in a directory. Raises UserError if they do not match the config."""
    encodings = Encodings(directory)
    found = encodings.encoding | encodings.preparation
    asked = {name: getattr(config, name) for name in ("recipe", *SIZES)}
    asked |= {name: value for name in ("pretrained", "revision") if (value := getattr(config, name))}
    for name, value in asked.items():
        if found.get(name) != value and not (name == "revision" and found.get("commit") == value):
            raise UserError(
                f"config.data.text={directory} holds text encoded with {name} {found.get(name)!r}, not "
                f"config.model.text.{name} {value!r}: {_REMEDY}, or change the config"
            )
    return encodings
