"""Context images: a user's own, for sampling, and folders of contexts and targets to train on, with captions or not."""

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_captioned_element, make_context_element
from trm_diffusion.data.captions import read_captions
from trm_diffusion.data.images import pixel_format, read_training_image
from trm_diffusion.errors import UserError
from trm_diffusion.readers.arrays import read_npy
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.images import IMAGE_SUFFIXES
from trm_diffusion.readers.paths import any_path, local_path

CONTEXTS, TARGETS = "context", "target"  # folders of `image_pairs`


def image_files(directory) -> list:
    """The image files of a folder, not of its subfolders, by name."""
    return [directory / name for name in list_files(directory, IMAGE_SUFFIXES)]


def read_contexts(path: str, *, size: int, channels: int) -> tuple[np.ndarray, list[str]]:
    """An image file, a folder of image files, or an array [N, size, size, channels] in [-1, 1] as .npy.

    Image files are resized and cropped to `size`, and have 1 (grey) or 3 (RGB) channels.

    Returns:
      float32 [N, size, size, channels] in [-1, 1], and a name for each.

    Raises:
      UserError: nothing there, an unreadable file, or another shape.
    """
    found = any_path(path, "--context")
    if not found.exists():
        raise UserError(f"--context={path}: no such file or folder; it holds the images to draw from")
    if found.suffix == ".npy":
        contexts = _read_array(path, (size, size, channels))
        return contexts, [f"{found.stem} {number}" for number in range(len(contexts))]
    if channels not in (1, 3):
        raise UserError(
            f"--context={path}: config.data.context_channels is {channels}, and image files have 1 or 3; "
            f"give an array [N, {size}, {size}, {channels}] in [-1, 1] as .npy"
        )
    files = image_files(found) if found.is_dir() else [found]
    if not files:
        raise UserError(f"--context={path} holds no image files ({', '.join(IMAGE_SUFFIXES)})")
    contexts = np.stack([read_training_image(file, size, channels) for file in files])
    return contexts, [file.stem for file in files]


def _read_array(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    contexts = read_npy(any_path(path, "--context"), (None, *shape))
    if not len(contexts):
        raise UserError(f"--context={path} holds no images")
    if not (np.abs(contexts) <= 1).all():
        raise UserError(f"--context={path} has values outside [-1, 1]; scale them")
    return contexts.astype(np.float32)


class ImagePairSource(Source):
    """`directory/context/NAME.png` and `directory/target/NAME.png` (or other image formats), in the order of names."""

    has_context = True
    reads_image_files = True
    num_classes = 1
    mirrored = ("image", "context")

    def __init__(self, directory: str, *, image_size: int, channels: int, context_channels: int):
        root = local_path(directory, "config.data.path")
        if not directory or not all((root / name).is_dir() for name in (CONTEXTS, TARGETS)):
            raise UserError(
                f"config.data.path={directory!r} is not a folder of pairs: config.data.source=image_pairs needs "
                f"the folders {CONTEXTS} and {TARGETS} in it, with files of the same names"
            )
        contexts, targets = ({file.stem: file for file in image_files(root / name)} for name in (CONTEXTS, TARGETS))
        alone = sorted(contexts.keys() ^ targets.keys())
        if alone:
            raise UserError(
                f"config.data.path={directory!r}: {len(alone)} images are in one of the folders {CONTEXTS} and "
                f"{TARGETS} alone, the first is {alone[0]}; add its other half or remove it"
            )
        if context_channels not in (1, 3):
            raise UserError(
                f"config.data.context_channels={context_channels}: context images have 1 (grey) or 3 (RGB) channels"
            )
        self._pairs = [(contexts[name], targets[name]) for name in sorted(contexts)]
        self._size, self.context_channels = image_size, context_channels
        self.sample_shape = (image_size, image_size, channels)

    @classmethod
    def from_config(cls, config: DataConfig) -> "ImagePairSource":
        return cls(config.path, **pixel_format(config), context_channels=config.context_channels)

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        return self._pairs[index][1].name

    def files(self, index: int) -> list[str]:
        return [*map(str, self._pairs[index])]

    def __getitem__(self, index: int) -> Element:
        context, target = self._pairs[index]
        image = read_training_image(target, self._size, self.sample_shape[-1])
        return make_context_element(image, read_training_image(context, self._size, self.context_channels), 0, index)


class CaptionedPairSource(ImagePairSource):
    """`ImagePairSource`, with `directory/target/NAME.txt` beside each target, which holds one caption per line."""

    captioned = True
    num_classes = 0

    def __init__(self, directory: str, **sizes):
        super().__init__(directory, **sizes)
        self._captions = [read_captions(target) for _, target in self._pairs]

    def captions(self, index: int) -> list[str]:
        return self._captions[index]

    def __getitem__(self, index: int) -> Element:
        pair = super().__getitem__(index)
        element = make_captioned_element(pair["image"], self._captions[index][0], index)
        return element | {"context": pair["context"]}
