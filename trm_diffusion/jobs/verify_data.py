"""The verification job: is a directory of prepared latents, or of encoded text, whole and what its manifest says?"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from trm_diffusion.config import Config
from trm_diffusion.data import encodings
from trm_diffusion.data.base import check_matches_config
from trm_diffusion.data.latents import LatentSource, assemble_manifest, decode_record, read_manifest, read_shard_record
from trm_diffusion.data.shards import MANIFEST_NAME
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.run.decoder import config_vae, difference
from trm_diffusion.runtime.logging import say


def verify(directory: str, config: Config | None = None) -> bool:
    """Reads everything in the directory again; prints a line for each finding, or one JSON line where there is none.

    config: checked too where there is one: of latents the classes, sizes, and the autoencoder `data.vae` if it names
    one; of text the sizes, and the encoders if `model.text` names them.
    """
    if not directory:
        raise UserError("--mode=verify needs --out=DIR, a directory that --mode=prepare or --mode=encode has written")
    findings, report = (_texts if _holds_texts(directory) else _latents)(directory, config)
    for finding in findings:
        print(f"error: {finding}", file=sys.stderr)
    if findings:
        say(f"{len(findings)} findings in {directory}; remove what is damaged and make it again by the same command")
    else:
        print(json.dumps({"directory": directory, **report, "pass": True}), flush=True)
    return not findings


def _holds_texts(directory: str) -> bool:
    try:
        return "encoding" in json.loads((pathlib.Path(directory) / MANIFEST_NAME).read_text())
    except (OSError, ValueError, TypeError):
        return False  # reading it as the manifest of latents says why


def _latents(directory: str, config: Config | None) -> tuple[list[str], dict]:
    manifest, root = read_manifest(directory), pathlib.Path(directory)
    spec = manifest["latent"]
    findings = [*_of_manifest(root, manifest), *_of_config(directory, spec, config)]
    counts = np.zeros(manifest["num_classes"], np.int64)
    for index, shard in enumerate(tqdm.tqdm(manifest["shards"], unit="shard", disable=None)):
        findings += _of_shard(root, index, shard, spec, counts)
    if not findings and counts.tolist() != manifest["class_counts"]:
        label = int(np.flatnonzero(counts != manifest["class_counts"])[0])
        findings.append(
            f"class {label} has {counts[label]} records, the manifest says {manifest['class_counts'][label]}"
        )
    return findings, {
        "records": manifest["records"],
        "shards": len(manifest["shards"]),
        "classes_with_records": int(np.count_nonzero(counts)),
        "bad_images": len(manifest["bad_images"]),
        "latent": f"{spec.size}x{spec.size}x{spec.channels}, scale {spec.scale}, shift {spec.shift}",
        "vae": spec.vae_id,
    }


def _texts(directory: str, config: Config | None) -> tuple[list[str], dict]:
    manifest, root = encodings.read_manifest(directory), pathlib.Path(directory)
    shards, sizes = manifest["shards"], [manifest["encoding"][name] for name in encodings.SIZES]
    about = [encodings.read_shard_record(root, index) for index in range(len(shards))]
    findings = list(_unlisted(root, shards))
    if None not in about:
        findings += _unlike(root, manifest, encodings.assemble_manifest(about))
    for shard, record in zip(tqdm.tqdm(shards, unit="shard", disable=None), about, strict=True):
        findings += _of_text_shard(root / shard["file"], shard, record, sizes)
    if config is not None and not findings:
        try:
            encodings.open_encodings(directory, config.model.text)
        except UserError as error:
            findings.append(str(error))
    return findings, {
        "records": manifest["records"],
        "items": manifest["items"],
        "shards": len(shards),
        "text": ", ".join(f"{name} {size}" for name, size in zip(encodings.SIZES, sizes, strict=True)),
        **{name: manifest["encoding"].get(name) for name in ("recipe", "encoders")},
    }


def _of_text_shard(path: pathlib.Path, shard: dict, about: dict | None, sizes: list[int]) -> Iterator[str]:
    """What is wrong with one shard of encoded text."""
    reader, finding = _opened(path, shard, about)
    if finding:
        yield finding
    if reader is None or about is None:
        return
    captions = sum(len(captions) for _, captions in about["items"])
    if captions != shard["records"]:
        yield f"{path} holds {shard['records']} records of {captions} captions"
    for position in range(shard["records"]):
        try:
            text = encodings.decode_record(reader.read([position])[0], *sizes)
        except ValueError as error:
            yield f"{path}: record {position} {error}"
            return
        if not (np.isfinite(text.states).all() and np.isfinite(text.pooled).all()):
            yield f"{path}: record {position} holds values that are not finite"
            return


def _of_manifest(root: pathlib.Path, manifest: dict) -> Iterator[str]:
    """The manifest is what the records of its shards make, and counts every image of the data."""
    yield from _unlisted(root, manifest["shards"])
    records = [read_shard_record(root, index) for index in range(len(manifest["shards"]))]
    if None in records:
        return  # a file is missing or damaged, which has a line of its own
    yield from _unlike(root, json.loads((root / MANIFEST_NAME).read_text()), assemble_manifest(records))
    preparation = manifest["preparation"]
    if preparation:
        views = 2 if preparation["flip"] else 1
        wanted = views * (preparation["images"] - len(manifest["bad_images"]))
        if manifest["records"] != wanted:
            yield f"{root} has {manifest['records']} records; images without the bad ones make {wanted}"


def _unlisted(root: pathlib.Path, shards: list[dict]) -> Iterator[str]:
    listed = {shard["file"] for shard in shards}
    for file in sorted(root.glob("*.array_record")):
        if file.name not in listed:
            yield f"{file} is not in the manifest"


def _unlike(root: pathlib.Path, written: dict, made: dict) -> Iterator[str]:
    for field in made:
        if made[field] != written.get(field):
            yield f"{root / MANIFEST_NAME}: {field} is not what the records of its shards say"


def _opened(path: pathlib.Path, shard: dict, about: dict | None) -> tuple[Any, str]:
    """A reader of a shard, or None where it is not what the manifest says; and what is wrong, if anything."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        return None, f"{path} is missing"
    if sha256_of_file(path) != shard.get("sha256"):
        return None, f"{path} is damaged: its checksum is not the manifest's"
    reader, said = ArrayRecordReader(str(path)), path.with_suffix(".json")
    if reader.num_records() != shard["records"]:
        return None, f"{path} holds {reader.num_records()} records, the manifest says {shard['records']}"
    return reader, "" if about else f"{said} is {'damaged' if said.is_file() else 'missing'}"


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
    path = root / shard["file"]
    reader, finding = _opened(path, shard, read_shard_record(root, index))
    if finding:
        yield finding
    if reader is None:
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
