"""The verification job: is a directory of prepared latents whole, and what its manifest says it is?"""

import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import tqdm

from trm_diffusion.autoencoder import config_vae, difference
from trm_diffusion.config import Config
from trm_diffusion.data.base import check_matches_config
from trm_diffusion.data.latents import (
    MANIFEST_NAME,
    LatentSource,
    assemble_manifest,
    decode_record,
    read_manifest,
    read_shard_record,
)
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.runtime.logging import say
from trm_diffusion.weights.source import sha256


def verify(directory: str, config: Config | None = None) -> bool:
    """Reads everything in the directory again; prints a line for each finding, or one JSON line where there is none.

    config: checked too where there is one: classes, sizes, and the autoencoder `data.vae` if it names one.
    """
    if not directory:
        raise UserError("--mode=verify needs --out=DIR, a directory that --mode=prepare has written")
    manifest = read_manifest(directory)
    root = pathlib.Path(directory)
    findings = [*_of_manifest(root, manifest), *_of_config(directory, manifest["latent"], config)]
    counts = np.zeros(manifest["num_classes"], np.int64)
    for index, shard in enumerate(tqdm.tqdm(manifest["shards"], unit="shard", disable=None)):
        findings += _of_shard(root, index, shard, manifest["latent"], counts)
    if not findings and counts.tolist() != manifest["class_counts"]:
        label = int(np.flatnonzero(counts != manifest["class_counts"])[0])
        findings.append(
            f"class {label} has {counts[label]} records, the manifest says {manifest['class_counts'][label]}"
        )
    for finding in findings:
        print(f"error: {finding}", file=sys.stderr)
    if not findings:
        spec = manifest["latent"]
        report = {
            "directory": directory,
            "records": manifest["records"],
            "shards": len(manifest["shards"]),
            "classes_with_records": int(np.count_nonzero(counts)),
            "bad_images": len(manifest["bad_images"]),
            "latent": f"{spec.size}x{spec.size}x{spec.channels}, scale {spec.scale}, shift {spec.shift}",
            "vae": spec.vae_id,
            "pass": True,
        }
        print(json.dumps(report), flush=True)
    else:
        say(f"{len(findings)} findings in {directory}; remove what is damaged and prepare it again")
    return not findings


def _of_manifest(root: pathlib.Path, manifest: dict) -> Iterator[str]:
    """The manifest is what the records of its shards make, and counts every image of the data."""
    listed = {shard["file"] for shard in manifest["shards"]}
    for file in sorted(root.glob("*.array_record")):
        if file.name not in listed:
            yield f"{file} is not in the manifest"
    records = [read_shard_record(root, index) for index in range(len(listed))]
    if None in records:
        return  # a file is missing or damaged, which has a line of its own
    made = assemble_manifest(records)
    written = json.loads((root / MANIFEST_NAME).read_text())
    for field in made:
        if made[field] != written.get(field):
            yield f"{root / MANIFEST_NAME}: {field} is not what the records of its shards say"
    preparation = manifest["preparation"]
    if preparation:
        views = 2 if preparation["flip"] else 1
        wanted = views * (preparation["images"] - len(manifest["bad_images"]))
        if manifest["records"] != wanted:
            yield f"{root} has {manifest['records']} records; images without the bad ones make {wanted}"


def _of_config(directory: str, spec: LatentSpec, config: Config | None) -> Iterator[str]:
    if config is None:
        return
    try:
        check_matches_config(LatentSource(directory), config.data)
        wanted = config_vae(config)[1] if config.data.vae else spec
    except UserError as error:
        yield str(error)
        return
    if spec != wanted:
        yield f"{directory} holds latents of {difference(spec, wanted)} of config.data.vae {config.data.vae}"


def _of_shard(root: pathlib.Path, index: int, shard: dict, spec: LatentSpec, counts: np.ndarray) -> Iterator[str]:
    """What is wrong with one shard; adds its records to the counts of classes [K]."""
    from array_record.python.array_record_module import ArrayRecordReader

    path = root / shard["file"]
    if not path.is_file():
        yield f"{path} is missing"
        return
    about = path.with_suffix(".json")
    if read_shard_record(root, index) is None:
        yield f"{about} is {'damaged' if about.is_file() else 'missing'}"
    if sha256(path) != shard.get("sha256"):
        yield f"{path} is damaged: its checksum is not the manifest's"
        return
    reader = ArrayRecordReader(str(path))
    if reader.num_records() != shard["records"]:
        yield f"{path} holds {reader.num_records()} records, the manifest says {shard['records']}"
        return
    for position in range(shard["records"]):
        try:
            mean, std, label = decode_record(reader.read([position])[0], spec)
        except ValueError as error:
            yield f"{path}: record {position} {error}"
            return
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
            yield f"{path}: record {position} holds values that are not finite, or a negative deviation"
            return
        if not 0 <= label < max(1, len(counts)):
            yield f"{path}: record {position} has the label {label} of {len(counts)} classes"
            return
        if len(counts):
            counts[label] += 1
