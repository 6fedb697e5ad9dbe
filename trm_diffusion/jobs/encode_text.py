"""The encoding job: encodes captions or prompts into a directory of shards (data/encodings.py)."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

from trm_diffusion.config import Config
from trm_diffusion.data.encodings import NONE, EncodingWriter, Item, assemble_manifest, read_shard_record
from trm_diffusion.data.origins import first_few
from trm_diffusion.data.sharded import ShardedJob, consecutive_ranges, make_shards, process_share
from trm_diffusion.data.sources import CAPTIONED_SOURCES, make_source
from trm_diffusion.data.text_encoders import TEXTS_AT_ONCE, PretrainedEncoder
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_json, sha256_of_names
from trm_diffusion.readers.paths import local_path
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.prompts import read_prompts
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.signals import StopRequest

SOURCES = tuple(source for source in CAPTIONED_SOURCES if source != "scenes")  # scenes never end


def encode(
    config: Config,
    out: str,
    stop: StopRequest,
    *,
    prompts: str = "",
    items_per_shard: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> None:
    """Encodes the captions of `config.data`, or the prompts of a file, with the encoders of `config.model.text`.

    Args:
      prompts: a file for `read_prompts`; "" encodes captions.
      items_per_shard: images or prompts per shard; the last shard may have fewer.
      process_index, process_count: this process makes every process_count-th shard, starting at process_index; JAX's
        own by default.

    Raises:
      UserError: no captions, no encoders, `out` holds shards made with other settings or is in use.
      Interrupted: asked to stop; complete shards are kept.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the GPU's memory
    if not out:
        raise UserError("--mode=encode needs --out=DIR, the directory to write")
    if config.model.text.encoder != "encoded":
        raise UserError("--mode=encode needs config.model.text.encoder=encoded; other models do not use encoded text")
    directory = local_path(out, "--out")
    share = process_share(process_index, process_count, items_per_shard)
    items = [NONE, *(_prompts(prompts) if prompts else _captions(config))]
    with claimed(directory, "--mode=encode", stop, share):
        job = TextJob(items, PretrainedEncoder(config.model.text), directory, items_per_shard)
        manifest = make_shards(job, share, stop)
    if manifest is not None:
        say(f"wrote {out}: {manifest['records']:,} texts of {manifest['items'] - 1:,} items, and the empty text")


def _captions(config: Config) -> list[Item]:
    if config.data.source not in SOURCES:
        raise UserError(
            f"--mode=encode reads captions; set config.data.source to one of {', '.join(SOURCES)}, not "
            f"{config.data.source}, or give --prompts=FILE"
        )
    source = make_source(dataclasses.replace(config.data, channels=3, num_classes=0))
    return [Item(source.name(index), source.captions(index)) for index in range(len(source))]


def _prompts(path: str) -> list[Item]:
    return [Item(f"prompt {number}", [prompt]) for number, prompt in enumerate(read_prompts(path))]


class TextJob(ShardedJob):
    """Shards of encoded text from consecutive items; the first item is the empty text."""

    contents, unit = "texts", "text"

    def __init__(self, items: list[Item], encoder: PretrainedEncoder, directory: pathlib.Path, items_per_shard: int):
        self._encoder = encoder
        self._items = [
            [items[item] for item in shard_items] for shard_items in consecutive_ranges(len(items), items_per_shard)
        ]
        self._preparation = {
            "items": len(items),
            "names_sha256": sha256_of_names(item.name for item in items[1:]),
            "captions_sha256": sha256_of_json(items),
            "items_per_shard": items_per_shard,
            **encoder.origin,
        }
        self.directory = directory
        self.sizes = [sum(len(item.captions) for item in shard_items) for shard_items in self._items]
        self.made_with = encoder.encoding | self._preparation

    def read_record(self, index: int) -> dict | None:
        return read_shard_record(self.directory, index)

    def made_with_of(self, record: dict) -> dict:
        return record["encoding"] | record["preparation"]

    def difference(self, field: str, before) -> str:
        if field not in ("names_sha256", "captions_sha256"):
            return super().difference(field, before)
        edited = []
        for index, items in enumerate(self._items):
            kept = [Item(*item) for item in (self.read_record(index) or {}).get("items", items)]
            edited += [now.name for was, now in zip(kept, items, strict=False) if was != now]
        return f"made from other texts for {first_few(edited)}" if edited else super().difference(field, before)

    def write_shard(self, index: int, advance: Callable[[int], None]) -> str:
        items = self._items[index]
        captions = [caption for item in items for caption in item.captions]
        with EncodingWriter(self.directory, index, items, self._encoder.encoding, self._preparation) as writer:
            for batch in consecutive_ranges(len(captions), TEXTS_AT_ONCE):
                advance(len(batch))
                for text in zip(*self._encoder([captions[caption] for caption in batch]), strict=True):
                    writer.write(*text)
        return f"{writer.records:,} texts of {len(items)} items"

    def assemble_manifest(self, records: list[dict]) -> dict:
        return assemble_manifest(records)

    def written_by(self) -> dict[str, str]:
        return self._encoder.written_by()
