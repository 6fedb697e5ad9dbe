"""Images from a folder of class folders, or from TensorFlow Datasets (TFDS) without TensorFlow."""

import pathlib
import threading

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_element
from trm_diffusion.errors import UserError
from trm_diffusion.readers.folders import list_below, list_files, list_folders
from trm_diffusion.readers.images import IMAGE_SUFFIXES, check_pixels, naming_damage, read_image, to_channels
from trm_diffusion.readers.paths import expand, local_path

CROP_RULE = "ADM: box halving, bicubic, centre"


def centre_crop(image, size: int):
    """Resizes and crops a PIL image to [size, size] as ADM (Dhariwal & Nichol, 2021) prepares ImageNet.

    Halve with a box filter while the short side stays at least 2 * size, then bring the short side to
    `size` with a bicubic filter (up or down), then cut out the centre. Raises ValueError for an image so thin that this
    would make it larger than any that is decoded.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    check_pixels(resized)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_training_image(image, size: int, channels: int) -> np.ndarray:
    """PIL image -> float32 [size, size, channels] in [-1, 1]; channels 1 (grey) or 3 (RGB)."""
    # Palettes and bit masks cannot be averaged, so the colour conversion comes before any resizing.
    image = centre_crop(to_channels(image, channels), size)
    pixels = np.asarray(image, np.float32).reshape(size, size, channels)
    return pixels / 127.5 - 1


def read_training_image(file, size: int, channels: int, name: str = "") -> np.ndarray:
    """`to_training_image` of a path or an open file, which errors call `name`. Raises UnreadableImage."""
    with naming_damage(name or file):
        return to_training_image(read_image(file, channels, name), size, channels)


def pixel_format(config: DataConfig) -> dict[str, int]:
    """`image_size` and `channels` for a source of image files. Raises UserError unless channels is 1 or 3."""
    if config.channels not in (1, 3):
        raise UserError(f"config.data.channels={config.channels}: images have 1 (grey) or 3 (RGB) channels")
    return {"image_size": config.image_size, "channels": config.channels}


class ImageFolderSource(Source):
    """`directory/<class>/<image>`: classes are the subfolders, numbered in the order of their names.

    Raises UserError for an image that would be left out: beside the class folders, or in a folder below one.
    """

    reads_image_files = True

    def __init__(self, directory: str, *, image_size: int, channels: int):
        root = local_path(directory, "config.data.path")
        if not directory or not root.is_dir():
            raise UserError(
                f"config.data.path={directory!r} is not a directory: config.data.source=image_folder needs "
                "one with a subfolder of images for each class"
            )
        self.class_names = tuple(list_folders(root))
        alone = list_files(root, IMAGE_SUFFIXES)
        if self.class_names and alone:
            raise UserError(f"{root / alone[0]} lies beside the class folders, in none of them: move or remove it")
        self._root = str(root)
        self._files: list[str] = []  # relative to the root: a million short strings, not a million paths
        labels = []
        for label, folder in enumerate(self.class_names):
            names = _images_of_class(root / folder)
            self._files += [f"{folder}/{name}" for name in names]
            labels += [label] * len(names)
        if not self._files:
            raise UserError(
                f"config.data.path={directory!r} holds no images: put them into one subfolder per class, as "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        self._labels = np.array(labels, np.int32)
        self.sample_shape = (image_size, image_size, channels)
        self.num_classes = len(self.class_names)

    @classmethod
    def from_config(cls, config: DataConfig) -> "ImageFolderSource":
        return cls(config.path, **pixel_format(config))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index]

    def files(self, index: int) -> list[str]:
        return [f"{self._root}/{self._files[index]}"]

    def __getitem__(self, index: int) -> Element:
        size, _, channels = self.sample_shape
        pixels = read_training_image(f"{self._root}/{self._files[index]}", size, channels)
        return make_element(pixels, self._labels[index], index)


def _images_of_class(folder: pathlib.Path) -> list[str]:
    """The names of a class's images. Raises UserError if there are none, or some in folders below."""
    names = list_files(folder, IMAGE_SUFFIXES)
    for below in list_folders(folder):
        if nested := list_below(folder / below, IMAGE_SUFFIXES):
            raise UserError(
                f"{folder / below / nested[0]} is not read: the images of a class lie in the class folder itself; move "
                f"those of {folder / below} up, or remove them"
            )
    if not names:
        raise UserError(f"the class folder {folder} holds no images: add some, or remove it")
    return names


class TfdsSource(Source):
    """A prepared TFDS dataset with the features `image` and `label`, read from its array_record files."""

    reads_image_files = True

    def __init__(self, name: str, split: str, data_dir: str, *, image_size: int, channels: int):
        self._name, self._split, self._data_dir = name, split, expand(data_dir, "config.data.path")
        self._lock = threading.Lock()
        builder = self._builder()
        self._check_features(dict(builder.info.features or {}))
        self._records = self._open(builder)
        self._length = len(self._records)
        self.sample_shape = (image_size, image_size, channels)

    def _check_features(self, features: dict) -> None:
        if "image" not in features or not hasattr(features.get("label"), "num_classes"):
            raise UserError(
                f"the TFDS dataset {self._name!r} has the features {', '.join(sorted(features)) or 'none'}: set "
                "config.data.tfds_name to one that has an image and a class label, named image and label"
            )
        self.num_classes = features["label"].num_classes

    @classmethod
    def from_config(cls, config: DataConfig) -> "TfdsSource":
        return cls(config.tfds_name, config.split, config.path, **pixel_format(config))

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"{self._name} {self._split} record {index}"

    def __getitem__(self, index: int) -> Element:
        with naming_damage(self.name(index)):
            record = self._record(index)
            return make_element(self._training_image(record), record["label"], index)

    def _record(self, index: int) -> dict:
        with self._lock:
            if self._records is None:
                self._records = self._open(self._builder())
        return self._records[index]

    def _training_image(self, record: dict) -> np.ndarray:
        from PIL import Image

        pixels = np.asarray(record["image"])  # [H, W, 1 or 3] uint8
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        size, _, channels = self.sample_shape
        return to_training_image(image, size, channels)

    def __getstate__(self) -> dict:
        # Open files and locks are not pickled; a worker process reopens the dataset on its first read.
        return self.__dict__ | {"_records": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _builder(self):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError("config.data.source=tfds needs a package: run pip install tensorflow-datasets") from error
        try:
            return tfds.builder(self._name, data_dir=self._data_dir or None, file_format="array_record")
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"TFDS knows no dataset {self._name!r}: set config.data.tfds_name to a name of its "
                "catalogue, or config.data.path to the data_dir that holds it"
            ) from error
        except ImportError as error:
            return self._prepared_builder(tfds, error)
        except ValueError as error:
            raise UserError(
                f"TFDS cannot open {self._name!r} ({' '.join(str(error).split())[:200]}): check "
                "config.data.tfds_name and config.data.path"
            ) from error

    def _prepared_builder(self, tfds, cause: ImportError):
        """Opens a prepared dataset without its own code, which cannot be imported without TensorFlow."""
        data_dir = self._data_dir or None
        try:
            return tfds.core.read_only_builder.builder_from_files(
                self._name, data_dir=data_dir, file_format="array_record"
            )
        except tfds.core.DatasetNotFoundError:
            raise UserError(
                f"the TFDS dataset {self._name!r} is not prepared in {data_dir or 'the default data_dir'}, and its "
                "code needs TensorFlow: prepare it as array_record where TensorFlow is installed, and set "
                "config.data.path to the data_dir"
            ) from cause

    def _open(self, builder):
        try:
            return builder.as_data_source(split=self._split)
        except (KeyError, ValueError, NotImplementedError, OSError) as error:
            splits = ", ".join(builder.info.splits)
            if splits and not isinstance(error, NotImplementedError):
                raise UserError(
                    f"the TFDS dataset {self._name!r} has no split {self._split!r} (it has {splits}): "
                    "set config.data.split"
                ) from error
            raise UserError(
                f"the TFDS dataset {self._name!r} is not prepared as array_record in "
                f'{self._data_dir or "the default data_dir"}: run python -c "import tensorflow_datasets as '
                f"tfds; tfds.builder('{self._name}', data_dir={self._data_dir or None!r}, "
                "file_format='array_record').download_and_prepare()\", or set config.data.path to where it is"
            ) from error
