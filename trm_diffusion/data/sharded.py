"""The driver of the jobs that fill a directory with shards: images to latents, captions to encoded text.

A shard depends only on its own items and is written by one process. Complete shards are skipped, and any process that
finds all shards complete writes the manifest. So a job that was interrupted and rerun, or shared by several processes,
ends with the same bytes.
"""

import abc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import tqdm

import trm_diffusion
from trm_diffusion.data.origins import first_few
from trm_diffusion.data.shards import holds_all_records, write_manifest
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.signals import StopRequest


class Share(NamedTuple):
    """The shards of one process: every `process_count`-th, starting at `process_index`."""

    process_index: int
    process_count: int

    def of(self, count: int) -> range:
        """This process's shards, out of `count`."""
        return range(self.process_index, count, self.process_count)


def process_share(process_index: int | None, process_count: int | None, per_shard: int) -> Share:
    """The share of a process; None means JAX's own index or count. Raises UserError if a number is out of range."""
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if per_shard < 1 or not 0 <= process_index < process_count:
        raise UserError(
            f"--images_per_shard={per_shard} must be at least 1, and --process_index={process_index} at least 0 "
            f"and less than --process_count={process_count}"
        )
    return Share(process_index, process_count)


def consecutive_ranges(count: int, size: int) -> list[range]:
    """Splits 0 .. count - 1 into ranges of `size`; the last may be shorter."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class ShardedJob(abc.ABC):
    """The part of a sharded job that depends on the kind of data.

    Attributes:
      directory: where the shards go.
      contents, unit: what the shards hold and the unit of progress, for messages.
      sizes: units of work in each shard.
      made_with: everything that determines the bytes of a shard, by field; JSON.
    """

    contents: str
    unit: str
    directory: pathlib.Path
    sizes: Sequence[int]
    made_with: dict[str, Any]

    @abc.abstractmethod
    def read_record(self, index: int) -> dict | None:
        """The JSON record of shard `index`; None if it or the shard is missing."""

    @abc.abstractmethod
    def made_with_of(self, record: dict) -> dict[str, Any]:
        """The `made_with` of a shard on disk, from its JSON record."""

    def changed_items(self, index: int, record: dict) -> list[str]:
        """Names of what the items of a shard on disk were made from and that has changed since; may be slow."""
        del index, record
        return []

    def difference(self, field: str, before: Any) -> str:
        """How a shard on disk, with `before` in a field of `made_with`, was made otherwise."""
        return f"made with {field} = {before!r}, not {self.made_with[field]!r}"

    @abc.abstractmethod
    def write_shard(self, index: int, advance: Callable[[int], None]) -> str:
        """Writes shard `index` and returns a short summary for the log.

        It calls `advance(units)` before each piece of work, which raises Interrupted if the job was asked to stop.
        """

    @abc.abstractmethod
    def assemble_manifest(self, records: list[dict]) -> dict:
        """The manifest, from the JSON records of all shards in order."""

    @abc.abstractmethod
    def written_by(self) -> dict[str, str]:
        """Versions of the packages that affect the bytes of a shard."""


def make_shards(job: ShardedJob, share: Share, stop: StopRequest) -> dict | None:
    """Makes the missing shards of this process, and writes the manifest if the directory is then complete.

    Returns:
      The manifest, or None if shards of other processes are still missing.

    Raises:
      UserError: the directory holds shards that were made with other settings, or from what has changed since.
      Interrupted: the job was asked to stop; complete shards are kept.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    count = len(job.sizes)
    mine = share.of(count)
    done = {index for index in range(count) if is_done(job, index)}
    _refuse_changes(job, [index for index in mine if index in done])
    total = sum(job.sizes[index] for index in mine)
    initial = sum(job.sizes[index] for index in mine if index in done)
    with tqdm.tqdm(total=total, initial=initial, unit=job.unit, mininterval=1, disable=None) as bar:
        units = initial
        for index in mine:
            if index in done:
                continue
            name = f"shard {index + 1} of {count}"

            def advance(more: int, name: str = name) -> None:
                nonlocal units
                if stop.requested:
                    raise Interrupted(
                        f"stopped in {name}, after {units:,} of {total:,} {job.unit}s; complete shards are kept"
                    )
                units += more
                bar.update(more)

            say(f"{name}: {job.write_shard(index, advance)}")

    missing = sum(not is_done(job, index) for index in range(count))
    if missing:
        say(f"this process has made its shards; {missing} of {count} are still missing from other processes")
        return None
    manifest = job.assemble_manifest([job.read_record(index) for index in range(count)])
    return write_manifest(job.directory, manifest, {"version": trm_diffusion.__version__} | job.written_by())


def is_done(job: ShardedJob, index: int) -> bool:
    """Whether this shard is complete. Raises UserError if it was made with other settings."""
    record = job.read_record(index)
    if record is None or not holds_all_records(job.directory, record):
        return False
    before = job.made_with_of(record)
    changed = [field for field, value in job.made_with.items() if before.get(field) != value]
    if changed:
        difference = job.difference(changed[0], before.get(changed[0]))
        raise UserError(f"{job.directory} holds {job.contents} {difference}: remove it, or give another --out")
    return True


def _refuse_changes(job: ShardedJob, shards: Sequence[int]) -> None:
    """Raises UserError if complete shards were made from what has changed since."""
    changed, stale = [], []
    for index in shards:
        record = job.read_record(index)
        if names := job.changed_items(index, record):
            changed += names
            stale.append(pathlib.PurePath(record["file"]).stem)
    if changed:
        remedy = " ".join(f"{name}.*" for name in stale[:10]) + (f" and {len(stale) - 10} more" * (len(stale) > 10))
        raise UserError(
            f"{job.directory} holds {job.contents} of other content than the data have now for {first_few(changed)}: "
            f"remove {remedy} there and run this again, restore the data, or give another --out"
        )
