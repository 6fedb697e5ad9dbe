"""Images in tar files, read in place: one tar per class, as ImageNet is published, or shards that include labels.

With one tar per class, the classes are numbered in the order of the tars' names. In shards, as webdataset writes them,
the class number of KEY.jpg (or another image format) is the text of KEY.cls in the same tar.
"""

import io
import os
import pathlib

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, check_labels, make_element
from trm_diffusion.data.images import pixel_format, read_training_image
from trm_diffusion.errors import UserError
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.images import IMAGE_SUFFIXES
from trm_diffusion.readers.opening import open_file
from trm_diffusion.readers.paths import local_path
from trm_diffusion.readers.tars import list_members

LABEL_SUFFIX = ".cls"
MOST_LABEL_BYTES = 64


class ImageTarSource(Source):
    """`directory/*.tar`, uncompressed. Opening reads the headers of all members once."""

    reads_image_files = True

    def __init__(self, directory: str, *, num_classes: int, image_size: int, channels: int):
        root = local_path(directory, "config.data.path")
        self._tars = [root / name for name in list_files(root, [".tar"])] if directory and root.is_dir() else []
        if not self._tars:
            raise UserError(
                f"config.data.path={directory!r} holds no .tar files: config.data.source=image_tars needs a tar of "
                "images for each class, or tars with a KEY.cls for each KEY.jpg"
            )
        names, places, labels = [], [], []
        for number, tar in enumerate(self._tars):
            images, classes = _index(tar)
            if classes and classes.keys() != {_key(name) for name, *_ in images}:
                raise UserError(f"{tar}: some image has no {LABEL_SUFFIX} file, or some {LABEL_SUFFIX} file no image")
            names += [name for name, *_ in images]
            places += [(number, offset, size) for _, offset, size in images]
            labels += [classes.get(_key(name)) for name, *_ in images]
        self._names, self._places = names, np.array(places, np.int64).reshape(-1, 3)
        without = [label is None for label in labels]
        if any(without) and not all(without):
            raise UserError(
                f"config.data.path={directory!r} mixes tars with and without {LABEL_SUFFIX} files: use one kind"
            )
        if all(without):  # the tars are the classes
            labels, num_classes = self._places[:, 0], len(self._tars)
        check_labels(labels, num_classes, self.name)
        self._labels = np.array(labels, np.int32)
        self.num_classes = num_classes
        self.sample_shape = (image_size, image_size, channels)

    @classmethod
    def from_config(cls, config: DataConfig) -> "ImageTarSource":
        return cls(config.path, num_classes=config.num_classes, **pixel_format(config))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._tars[self._places[index, 0]].name}/{self._names[index]}"

    def files(self, index: int) -> list[str]:
        return [str(self._tars[self._places[index, 0]])]

    def content(self, index: int) -> bytes:
        tar, offset, length = self._places[index]
        with open_file(self._tars[tar]) as file:
            return os.pread(file.fileno(), int(length), int(offset))

    def __getitem__(self, index: int) -> Element:
        size, _, channels = self.sample_shape
        pixels = read_training_image(io.BytesIO(self.content(index)), size, channels, name=self.name(index))
        return make_element(pixels, self._labels[index], index)


def _index(path: pathlib.Path) -> tuple[list[tuple[str, int, int]], dict[str, int]]:
    """Name, offset and size of each image in a tar, in order, and the class numbers by key."""
    images, classes = [], {}
    members = list_members(path, [*IMAGE_SUFFIXES, LABEL_SUFFIX])
    if not members:
        raise UserError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}): fetch it again, or remove it")
    with open_file(path) as file:
        for name, offset, size in members:
            if not name.lower().endswith(LABEL_SUFFIX):
                images.append((name, offset, size))
                continue
            text = os.pread(file.fileno(), min(size, MOST_LABEL_BYTES), offset)
            try:
                classes[_key(name)] = int(text)
            except ValueError:
                raise UserError(f"{path}: {name} holds {text!r}, not the number of a class") from None
    return images, classes


def _key(name: str) -> str:
    """A member's name up to the first dot of its last part; an image and its label share it."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
