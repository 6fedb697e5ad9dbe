"""The encoding job: captions, or prompts, to a directory of encoded text (data/encodings.py).

As latents are prepared (`jobs/prepare_latents.py`): a shard is made whole by one process, one that is there is not made
again, and whichever process finds all shards there writes the manifest. So a job that was interrupted, or shared, gives
the same bytes.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import tqdm

import trm_diffusion
from trm_diffusion.config import Config
from trm_diffusion.data.encodings import NONE, EncodingWriter, Item, read_shard_record, write_manifest
from trm_diffusion.data.shards import refuse_change
from trm_diffusion.data.sources import CAPTIONED_SOURCES, make_source
from trm_diffusion.data.text_encoders import TEXTS_AT_ONCE, PretrainedEncoder
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.files import sha256_of_json, sha256_of_names
from trm_diffusion.jobs.prepare_latents import process_share
from trm_diffusion.run.prompts import read_prompts
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.signals import StopRequest

SOURCES = tuple(source for source in CAPTIONED_SOURCES if source != "scenes")  # which has no end


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
    """Encodes the captions of `config.data`, or the prompts of a file, by the encoders of `config.model.text`.

    Args:
      prompts: a file for `read_prompts`.
      items_per_shard: images, or prompts, of each shard but the last.
      process_index, process_count: this process makes every process_count-th shard from process_index on; JAX's own by
        default.

    Raises:
      UserError: no captions, no encoders, or `out` holds shards that were made otherwise.
      Interrupted: asked to stop; the shards that are whole stay.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the GPU's memory
    if not out:
        raise UserError("--mode=encode needs --out=DIR, where the encoded texts go")
    if config.model.text.encoder != "encoded":
        raise UserError(
            "--mode=encode is for config.model.text.encoder=encoded; other models read words, and need no cache"
        )
    process_index, process_count = process_share(process_index, process_count, items_per_shard)
    items = [NONE, *(_prompts(prompts) if prompts else _captions(config))]
    encoder = PretrainedEncoder(config.model.text)
    preparation = {
        "items": len(items),
        "names_sha256": sha256_of_names(item.name for item in items[1:]),
        "captions_sha256": sha256_of_json(items),
        "items_per_shard": items_per_shard,
        **encoder.origin,
    }
    directory = pathlib.Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    shards = [items[first : first + items_per_shard] for first in range(0, len(items), items_per_shard)]
    for index in range(process_index, len(shards), process_count):
        if not is_done(directory, index, encoder.encoding, preparation):
            with EncodingWriter(directory, index, encoder.encoding, preparation) as writer:
                write_shard(writer, shards[index], encoder, stop, f"shard {index + 1} of {len(shards)}")

    missing = sum(not is_done(directory, index, encoder.encoding, preparation) for index in range(len(shards)))
    if missing:
        say(f"this process has made its shards; {missing} of {len(shards)} are still to come from others")
        return
    written_by = {"version": trm_diffusion.__version__} | encoder.written_by()
    manifest = write_manifest(directory, [read_shard_record(directory, i) for i in range(len(shards))], written_by)
    say(f"wrote {directory}: {manifest['records']:,} texts of {manifest['items'] - 1:,} items, and of none")


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


def is_done(directory: pathlib.Path, index: int, encoding: dict, preparation: dict) -> bool:
    """Is this shard whole? Raises UserError where it was made otherwise."""
    record = read_shard_record(directory, index)
    if record is None:
        return False
    refuse_change(directory, "texts", record["encoding"] | record["preparation"], encoding | preparation)
    return True


def write_shard(
    writer: EncodingWriter, items: Sequence[Item], encoder: PretrainedEncoder, stop: StopRequest, name: str
) -> None:
    """Encodes and writes the captions of one shard."""
    captions = [caption for item in items for caption in item.captions]
    for first in tqdm.tqdm(
        range(0, len(captions), TEXTS_AT_ONCE), desc=name, unit="batch", mininterval=1, disable=None
    ):
        if stop.requested:
            raise Interrupted(f"stopped in {name}; the shards before it are whole")
        for text in zip(*encoder(captions[first : first + TEXTS_AT_ONCE]), strict=True):
            writer.write(*text)
    writer.finish(items)
