"""A set of images on disk that were all drawn alike, over any number of starts of a job.

A JSON record holds everything that the pixels depend on (run/protocol.py), and a set is only continued with the same.
Every PNG carries a mark, a hash of the record and the image's name in the set. With PNG's own checksums it tells a
whole image in its place from one that is cut off, damaged, swapped or of another set, and since an image and its mark
are one file, no index can disagree with the images.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from trm_diffusion.analysis.grids import mark_of_png, save_png
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_json, sha256_of_text, write_json
from trm_diffusion.readers.folders import list_files, list_folders
from trm_diffusion.readers.records import read_json
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import is_main_process

# Fields of the record that may differ when a set is continued: software and device.
FREE = ("version", "git_commit", "jax", "device")
READERS = 16  # threads that read images


class DrawnSet:
    """The images in `folder`, which `record`, stored at `record_path`, describes.

    First `check`, then `lacking`, then `begin`, then `save`. Every process of the run calls the first three.
    """

    def __init__(self, folder: epath.Path, record_path: epath.Path, record: dict):
        self.folder, self.record_path, self.record = folder, record_path, record
        self._id = sha256_of_json(_flat(record))

    def check(self) -> None:
        """Raises UserError if the folder holds images of another record, or of none. Writes nothing."""
        check_record(self.record_path, self.folder, self.record)
        if not self.record_path.exists() and any(visible(self.folder)):
            place = "in it" if self.record_path.parent == self.folder else "beside it"
            raise UserError(
                f"{self.folder} is not empty and has no {self.record_path.name} {place}: give another --out"
            )

    def lacking(self, names: Sequence[str]) -> np.ndarray:
        """bool [N]: which images must be drawn, because they are missing, damaged or not the ones of that name.

        Process 0 reads all images there are, and decides for all processes; none writes before it has.
        """
        flags = np.ones(len(names), np.int32)
        if is_main_process() and self.folder.exists():
            with ThreadPoolExecutor(READERS) as readers:
                marks = list(readers.map(lambda name: mark_of_png(self.folder / name), names))
            flags = np.array([mark != self.mark(name) for mark, name in zip(marks, names, strict=True)], np.int32)
            spoilt = [name for name, flag in zip(names, flags, strict=True) if flag and (self.folder / name).exists()]
            if spoilt:
                say(
                    f"{len(spoilt)} images in {self.folder} are damaged, or not the ones of their name, and will be "
                    f"drawn again; the first is {spoilt[0]}"
                )
        return np.asarray(multihost_utils.broadcast_one_to_all(flags)).astype(bool)

    def begin(self) -> None:
        """Writes the record, if it is not there yet."""
        if is_main_process() and not self.record_path.exists():
            write_json(self.record_path, self.record)

    def mark(self, name: str) -> str:
        """What the PNG of this name carries as its mark."""
        return sha256_of_text(f"{self._id} {name}")[:32]

    def save(self, name: str, pixels: np.ndarray) -> None:
        """Writes one image, uint8 [H, W, 3], atomically."""
        save_png(self.folder / name, pixels, self.mark(name))


def check_record(path: epath.Path, images: epath.Path, record: dict) -> None:
    """Raises UserError if there is a record at `path` and it describes other images than `record`, by the first field.

    images: what the record at `path` describes, for the message.
    """
    if not path.exists():
        return
    remedy = "remove it, or give another --out"
    try:
        before = _flat(read_json(path))
    except UserError:
        raise UserError(
            f"{path} is damaged, so it is unknown how {images} was drawn: remove both, or give another --out"
        ) from None
    now = _flat(record)
    for field, value in now.items():
        if field not in before:
            raise UserError(f"{images} holds images whose record {path.name} lacks {field} ({value!r} now): {remedy}")
        if before[field] != value:
            raise UserError(f"{images} holds images drawn with {field} = {before[field]!r}, not {value!r}: {remedy}")
    for field in before.keys() - now.keys():
        raise UserError(f"{images} holds images drawn with {field} = {before[field]!r}, which this job lacks: {remedy}")


def visible(folder: epath.Path) -> list[str]:
    """Names in a folder, if it exists, without hidden ones, such as what a killed job left."""
    return sorted([*list_files(folder), *list_folders(folder)]) if folder.exists() else []


def _flat(record: dict, prefix: str = "") -> dict:
    """Fields that must not differ, those of nested dictionaries by "OUTER.INNER"."""
    flat = {}
    for field, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{field}.")
        elif prefix or field not in FREE:
            flat[prefix + field] = value
    return flat
