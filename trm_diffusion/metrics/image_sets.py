"""Sets of images on disk, read batch by batch: a folder of pictures, or an npz file in ADM's layout."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from trm_diffusion.data.images import centre_crop
from trm_diffusion.errors import UserError
from trm_diffusion.readers.arrays import NpzFile
from trm_diffusion.readers.folders import list_below
from trm_diffusion.readers.images import IMAGE_SUFFIXES, naming_damage, read_image
from trm_diffusion.readers.paths import any_path

READERS = 8  # threads that decode pictures
ARRAY, LABELS = "arr_0", "arr_1"


class ImageSet:
    """Images uint8 [N, H, W, 3], in a fixed order; grey images get three equal channels.

    path: the folder or file. labels: [N] class numbers, or None if unknown.
    """

    path: epath.Path
    labels: np.ndarray | None

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, size: int, share: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
        """Yields all images in order, `size` at a time; the last batch may be smaller.

        share: (i, n) yields only the i-th of every n batches, with the last batch in place of any beyond it.
        """
        raise NotImplementedError

    def _first_images(self, size: int, share: tuple[int, int]) -> list[int]:
        """Index of the first image of each batch."""
        last = (len(self) - 1) // size
        index, count = share
        return [size * min(turn + index, last) for turn in range(0, last + 1, count)]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The images at the given indices, which must increase."""
        taken, first = [], 0
        for batch in self.batches(1024):
            start, end = np.searchsorted(indices, [first, first + len(batch)])
            taken.append(batch[indices[start:end] - first])
            first += len(batch)
        return np.concatenate(taken)

    def sorted_by_class(self) -> bool:
        labels = self.labels
        return labels is not None and labels[0] != labels[-1] and bool((np.diff(labels) >= 0).all())


def open_images(path: str, image_size: int = 0) -> ImageSet:
    """The images in a folder (subfolders included) or in `arr_0` of an npz file.

    Args:
      path: the folder or .npz file.
      image_size: crop and resize pictures of a folder to this, as ADM does; 0 leaves them, all of one size, unchanged.

    Raises:
      UserError: a missing path, no images, or another layout.
    """
    location = any_path(path, "--images")
    if location.is_dir():
        return FolderImages(location, image_size)
    if not location.exists() or location.suffix != ".npz":
        raise UserError(f"--images={path} is neither a folder of images nor an .npz file")
    return NpzImages(location)


class FolderImages(ImageSet):
    """Pictures in the order of their names; subfolders, if any, are the classes."""

    def __init__(self, path: epath.Path, image_size: int = 0):
        self.path = path
        self._image_size = image_size
        self._shape: tuple[int, int, int] | None = None  # of the first image read
        self._files = [path / name for name in list_below(path, IMAGE_SUFFIXES)]
        if not self._files:
            raise UserError(f"--images={path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        folders, labels = np.unique([str(file.parent) for file in self._files], return_inverse=True)
        self.labels = labels if len(folders) > 1 else None

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, size: int, share: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(READERS) as readers:
            for first in self._first_images(size, share):
                yield self._stacked(self._files[first : first + size], readers)

    def take(self, indices: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(READERS) as readers:
            return self._stacked([self._files[index] for index in indices], readers)

    def _stacked(self, files: list[epath.Path], readers: ThreadPoolExecutor) -> np.ndarray:
        images = list(readers.map(self._read, files))
        self._shape = self._shape or images[0].shape
        for file, image in zip(files, images, strict=True):
            if image.shape != self._shape:
                (height, width, _), (usual_height, usual_width, _) = image.shape, self._shape
                raise UserError(
                    f"{file} is {width}x{height}, others are {usual_width}x{usual_height}: give --image_size to crop "
                    "all to one size as ADM does"
                )
        return np.stack(images)

    def _read(self, file: epath.Path) -> np.ndarray:
        with naming_damage(file):
            image = read_image(file, 3)
            return np.asarray(centre_crop(image, self._image_size) if self._image_size else image)


class NpzImages(ImageSet):
    """`arr_0` [N, H, W, 3 or 1] uint8 of an npz file, and its labels `arr_1` if it has them."""

    def __init__(self, path: epath.Path):
        self.path = path
        self._file = NpzFile(path)
        if ARRAY not in self._file.headers:
            raise UserError(f"{path} is not an npz file with images in {ARRAY}; it has {[*self._file.headers]}")
        shape, dtype, order = self._file.headers[ARRAY]
        if len(shape) != 4 or not all(shape) or shape[-1] not in (1, 3) or dtype != np.uint8 or order != "C":
            raise UserError(f"{path}: {ARRAY} must be uint8 [N, H, W, 3], it is {dtype} {list(shape)} in {order} order")
        self._shape = shape
        self.labels = self._file.read(LABELS, shape[:1], kinds="iu") if LABELS in self._file.headers else None
        if self.labels is not None and self.labels.min() < 0:
            raise UserError(f"{path}: {LABELS} must be class numbers, integers from 0, not {self.labels.min()}")

    def __len__(self) -> int:
        return self._shape[0]

    def batches(self, size: int, share: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
        image_bytes = int(np.prod(self._shape[1:]))
        with self._file.stream(ARRAY) as stream:
            start = stream.tell()
            for first in self._first_images(size, share):
                stream.seek(start + first * image_bytes)
                count = min(size, len(self) - first)
                flat = np.frombuffer(stream.read(count * image_bytes), np.uint8)
                if len(flat) != count * image_bytes:
                    raise UserError(f"{self.path} ends after {first} of {len(self)} images: write it again")
                images = flat.reshape(count, *self._shape[1:])
                yield np.broadcast_to(images, (*images.shape[:3], 3))
