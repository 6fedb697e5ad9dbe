"""Writes latents for tests in the format of `--mode=prepare`."""

import itertools
import pathlib
from collections.abc import Iterable

import numpy as np

from trm_diffusion.data.latents import ShardWriter, assemble_manifest, read_shard_record
from trm_diffusion.data.shards import write_manifest
from trm_diffusion.models.latent import LatentSpec

Record = tuple[np.ndarray, np.ndarray, int]  # mean, standard deviation, label


def write_latents(
    directory: pathlib.Path, spec: LatentSpec, num_classes: int, records: Iterable[Record], per_shard: int = 1000
) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    records, count = iter(records), 0
    while shard := list(itertools.islice(records, per_shard)):
        with ShardWriter(directory, count, spec, num_classes) as writer:
            for record in shard:
                writer.write(*record)
        count += 1
    write_manifest(directory, assemble_manifest([read_shard_record(directory, index) for index in range(count)]))
    return directory
