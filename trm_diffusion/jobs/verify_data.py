"""The verification job: checks that a directory of latents or encoded text is complete and matches its manifest."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import tqdm

from trm_diffusion.config import Config
from trm_diffusion.data import encodings, latents
from trm_diffusion.data.base import check_matches_config
from trm_diffusion.data.shards import MANIFEST_NAME
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_file
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import check, read_json
from trm_diffusion.run.decoder import config_vae, difference
from trm_diffusion.runtime.logging import say


def verify(directory: str, config: Config | None = None) -> bool:
    """Re-reads the whole directory; prints a line for each finding, or one JSON line if there is none.

    config: if given, latents must match its classes, sizes and autoencoder (if `data.vae` names one), and text its
    sizes and encoders (if `model.text` names them). Returns whether there is no finding.
    """
    if not directory:
        raise UserError("--mode=verify needs --out=DIR, a directory written by --mode=prepare or --mode=encode")
    findings, report = (_verify_texts if _holds_texts(directory) else _verify_latents)(directory, config)
    for finding in findings:
        print(f"error: {finding}", file=sys.stderr)
    if findings:
        say(f"{len(findings)} findings in {directory}; remove damaged files and run the command that made them again")
    else:
        print(json.dumps({"directory": directory, **report, "pass": True}), flush=True)
    return not findings


def _holds_texts(directory: str) -> bool:
    try:
        return "encoding" in read_json(local_path(directory, "--out") / MANIFEST_NAME)
    except UserError:
        return False  # reading it as a manifest of latents raises the right error


def _verify_latents(directory: str, config: Config | None) -> tuple[list[str], dict]:
    """Findings, and the report where there are none."""
    manifest = latents.read_manifest(directory)
    root = local_path(directory)
    spec, shards = manifest["latent"], manifest["shards"]
    shard_records = [latents.read_shard_record(root, index) for index in range(len(shards))]
    findings = list(_manifest_findings(root, shards, shard_records, latents.assemble_manifest))
    if None not in shard_records:
        findings += _image_count_findings(root, manifest)
    if config is not None:
        findings += _latent_config_findings(directory, spec, config)
    counts = np.zeros(manifest["num_classes"], np.int64)

    def check(record: bytes) -> str | None:
        return _latent_finding(record, spec, counts)

    findings += _shard_findings(root, shards, shard_records, check)
    if not findings and counts.tolist() != manifest["class_counts"]:
        label = int(np.flatnonzero(counts != manifest["class_counts"])[0])
        findings.append(
            f"class {label} has {counts[label]} records, the manifest says {manifest['class_counts'][label]}"
        )
    return findings, {
        "records": manifest["records"],
        "shards": len(shards),
        "classes_with_records": int(np.count_nonzero(counts)),
        "bad_images": len(manifest["bad_images"]),
        "latent": f"{spec.size}x{spec.size}x{spec.channels}, scale {spec.scale}, shift {spec.shift}",
        "vae": spec.vae_id,
    }


def _verify_texts(directory: str, config: Config | None) -> tuple[list[str], dict]:
    """Findings, and the report where there are none."""
    manifest = encodings.read_manifest(directory)
    root = local_path(directory)
    shards = manifest["shards"]
    sizes = [manifest["encoding"][name] for name in encodings.SIZES]
    shard_records = [encodings.read_shard_record(root, index) for index in range(len(shards))]
    findings = list(_manifest_findings(root, shards, shard_records, encodings.assemble_manifest))
    for shard, record in zip(shards, shard_records, strict=True):
        captions = None if record is None else sum(len(captions) for _, captions in record["items"])
        if captions not in (None, shard["records"]):
            findings.append(f"{root / shard['file']} holds {shard['records']} records of {captions} captions")
    findings += _shard_findings(root, shards, shard_records, lambda record: _text_finding(record, sizes))
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


def _manifest_findings(
    root: pathlib.Path, shards: list[dict], shard_records: list[dict | None], assemble: Callable[[list[dict]], dict]
) -> Iterator[str]:
    """Yields shards that the manifest does not list, and its fields that differ from the records of the shards."""
    listed = {shard["file"] for shard in shards}
    for name in list_files(root, [".array_record"]):
        if name not in listed:
            yield f"{root / name} is not in the manifest"
    if None in shard_records:
        return  # a missing or damaged file has its own finding
    written = read_json(root / MANIFEST_NAME)
    for field, value in assemble(shard_records).items():
        if value != written.get(field):
            yield f"{root / MANIFEST_NAME}: {field} is not what the records of its shards say"


def _shard_findings(
    root: pathlib.Path, shards: list[dict], shard_records: list[dict | None], check: Callable[[bytes], str | None]
) -> Iterator[str]:
    """Yields damaged shards, and the first record of each shard in which `check` finds a problem."""
    from array_record.python.array_record_module import ArrayRecordReader

    for shard, record in zip(tqdm.tqdm(shards, unit="shard", disable=None), shard_records, strict=True):
        path = root / shard["file"]
        if not path.is_file():
            yield f"{path} is missing"
            continue
        if sha256_of_file(path) != shard.get("sha256"):
            yield f"{path} is damaged: its checksum is not the manifest's"
            continue
        reader = ArrayRecordReader(str(path))
        if reader.num_records() != shard["records"]:
            yield f"{path} holds {reader.num_records()} records, the manifest says {shard['records']}"
            continue
        if record is None:
            record_path = path.with_suffix(".json")
            yield f"{record_path} is {'damaged' if record_path.is_file() else 'missing'}"
        for position in range(shard["records"]):
            if finding := check(reader.read([position])[0]):
                yield f"{path}: record {position} {finding}"
                break


def _latent_finding(record: bytes, spec: LatentSpec, counts: np.ndarray) -> str | None:
    """The problem of one record of latents, or None; adds its label to the counts of classes [K]."""
    try:
        mean, std, label = latents.decode_record(record, spec)
    except ValueError as error:
        return str(error)
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        return "holds values that are not finite, or a negative standard deviation"
    if not 0 <= label < max(1, len(counts)):
        return f"has the label {label} of {len(counts)} classes"
    if len(counts):
        counts[label] += 1
    return None


def _text_finding(record: bytes, sizes: list[int]) -> str | None:
    """The problem of one record of encoded text, or None."""
    try:
        text = encodings.decode_record(record, *sizes)
    except ValueError as error:
        return str(error)
    if not (np.isfinite(text.states).all() and np.isfinite(text.pooled).all()):
        return "holds values that are not finite"
    return None


def _image_count_findings(root: pathlib.Path, manifest: dict) -> Iterator[str]:
    """Checks that the manifest accounts for every image of the data."""
    preparation = manifest["preparation"]
    if preparation:
        check(preparation, {"images": int, "flip": bool}, f"{root / MANIFEST_NAME}: preparation")
        views = 2 if preparation["flip"] else 1
        wanted = views * (preparation["images"] - len(manifest["bad_images"]))
        if manifest["records"] != wanted:
            yield f"{root} has {manifest['records']} records; its readable images give {wanted}"


def _latent_config_findings(directory: str, spec: LatentSpec, config: Config) -> Iterator[str]:
    """Checks that the latents are those of the config."""
    try:
        check_matches_config(latents.LatentSource(directory), config.data)
        wanted = config_vae(config)[1] if config.data.vae else spec
    except UserError as error:
        yield str(error)
        return
    if spec != wanted:
        yield f"{directory} holds latents of {difference(spec, wanted)} of config.data.vae {config.data.vae}"
