"""Captioned images for real training, from a folder or from TensorFlow Datasets (TFDS) without TensorFlow.

The captions are open text: they need a pretrained text encoder, or the user's own vocabulary.
"""

import pathlib

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_captioned_element
from trm_diffusion.data.images import TfdsSource, pixel_format, read_training_image
from trm_diffusion.errors import UserError
from trm_diffusion.readers.folders import list_below
from trm_diffusion.readers.images import IMAGE_SUFFIXES, naming_damage
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.records import check, read_json_lines
from trm_diffusion.readers.text import read_lines

CAPTIONS_FILE = "captions.jsonl"


class _CaptionedSource(Source):
    """Records with one or more captions. Training draws one on each read; a plain read returns the first."""

    captioned = True
    stochastic = True

    def __getitem__(self, index: int) -> Element:
        image, captions = self._read(index)
        return make_captioned_element(image, captions[0], index)

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        image, captions = self._read(index)
        return make_captioned_element(image, captions[int(rng.integers(len(captions)))], index)

    def captions(self, index: int) -> list[str]:
        return self._read(index)[1]

    def _read(self, index: int) -> tuple[np.ndarray, list[str]]:
        """The image [H, W, C] in [-1, 1] and its captions, at least one."""
        raise NotImplementedError


class CaptionFolderSource(_CaptionedSource):
    """A folder of captioned images, in the order of `captions.jsonl` or else of their paths.

    Each line of `captions.jsonl` is {"file": path relative to the folder, "caption": text}, or has a list "captions".
    Without that file, `name.txt` next to each `name.png` (or another image format) holds one caption per line.
    """

    reads_image_files = True

    def __init__(self, directory: str, *, image_size: int, channels: int):
        self._root = local_path(directory, "config.data.path")
        if not directory or not self._root.is_dir():
            raise UserError(
                f"config.data.path={directory!r} is not a directory: config.data.source=caption_folder needs one "
                f"with images, and with {CAPTIONS_FILE} or a .txt file next to each image"
            )
        listed = (self._root / CAPTIONS_FILE).exists()
        self._records = self._listed() if listed else self._beside()
        if not self._records:
            raise UserError(f"config.data.path={directory!r} holds no images with captions")
        self.sample_shape = (image_size, image_size, channels)

    @classmethod
    def from_config(cls, config: DataConfig) -> "CaptionFolderSource":
        return cls(config.path, **pixel_format(config))

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return self._records[index][0]

    def files(self, index: int) -> list[str]:
        return [str(self._root / self._records[index][0])]

    def captions(self, index: int) -> list[str]:
        return self._records[index][1]

    def _listed(self) -> list[tuple[str, list[str]]]:
        path = self._root / CAPTIONS_FILE
        remedy = 'each line is {"file": ..., "caption": ...}'
        records = []
        for where, record in read_json_lines(path, {"file": str}, remedy):
            check(record, {"captions": [str]} if "captions" in record else {"caption": str}, where, remedy)
            captions = record["captions"] if "captions" in record else [record["caption"]]
            records.append(_checked(self._root, record["file"], captions, where))
        return records

    def _beside(self) -> list[tuple[str, list[str]]]:
        records = []
        for file in list_below(self._root, IMAGE_SUFFIXES):
            records.append((file, read_captions(self._root / file)))
        return records

    def _read(self, index: int) -> tuple[np.ndarray, list[str]]:
        file, captions = self._records[index]
        size, _, channels = self.sample_shape
        return read_training_image(str(self._root / file), size, channels), captions


def read_captions(image: pathlib.Path) -> list[str]:
    """The captions in the .txt file beside an image, one per line. Raises UserError if it has none."""
    text = image.with_suffix(".txt")
    captions = read_lines(text) if text.exists() else []
    return _checked(image.parent, image.name, captions, str(text))[1]


def _checked(root: pathlib.Path, file: str, captions: list[str], where: str) -> tuple[str, list[str]]:
    """The record. Raises UserError if its image does not exist or it has no caption."""
    if not (root / file).is_file():
        raise UserError(f"{where}: the image {root / file} does not exist")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise UserError(f"{where}: no caption for the image {file}")
    return file, captions


class TfdsCaptionSource(_CaptionedSource, TfdsSource):
    """A prepared TFDS dataset with the features `image` and `captions` (with a `text` each), as in `coco_captions`."""

    def _check_features(self, features: dict) -> None:
        if "image" not in features or "text" not in getattr(features.get("captions"), "feature", {}):
            raise UserError(
                f"the TFDS dataset {self._name!r} has the features {', '.join(sorted(features)) or 'none'}: set "
                "config.data.tfds_name to one that has an image, and captions with text, such as coco_captions"
            )

    def _read(self, index: int) -> tuple[np.ndarray, list[str]]:
        with naming_damage(self.name(index)):
            record = self._record(index)
            texts = record["captions"]["text"]
            return self._training_image(record), [text.decode() if isinstance(text, bytes) else text for text in texts]
