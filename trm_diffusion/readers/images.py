"""Image files: 8-bit pixels of 1 (grey) or 3 (RGB) channels from every mode that has a clear meaning.

| in the file | read as |
|---|---|
| grey, RGB, palette, CMYK, YCbCr, 1 bit | as Pillow converts it |
| 16 bits a channel | rounded to 8 bits; 65,535 is white |
| alpha, a transparent colour | laid on white |
| EXIF orientation | applied |
| 32-bit whole numbers, floats | refused: no value is agreed on for white |

Only the formats of IMAGE_SUFFIXES are opened, whatever a file is named, and no more than MAX_PIXELS decoded.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.readers.opening import open_regular
from trm_diffusion.readers.paths import PathLike

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # of a decoded image: where Pillow warns of a decompression bomb
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
BACKGROUND = (255, 255, 255, 255)  # under transparent pixels
_ORIENTATION = 0x0112  # an EXIF tag


class UnreadableImage(UserError):
    """One image of a data set cannot be decoded; the others may be fine."""


def read_image(file: PathLike | BinaryIO, channels: int, name: str = ""):
    """A PIL image of mode L (1 channel) or RGB (3) from a path or an open file, which errors call `name`.

    Raises UnreadableImage.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error here
    with naming_damage(name or file), contextlib.ExitStack() as stack:
        if isinstance(file, PathLike):
            file = stack.enter_context(open_regular(file))
        image = stack.enter_context(Image.open(file, formats=FORMATS))
        check_pixels(image.size)
        return to_channels(upright(image), channels)


def check_pixels(size: tuple[int, int]) -> None:
    """Raises ValueError for more than MAX_PIXELS."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels, at most {MAX_PIXELS:,} are decoded")


def to_channels(image, channels: int):
    """A PIL image in any mode, as mode L or RGB. Raises ValueError for a mode without a clear meaning."""
    from PIL import Image

    mode = MODES[channels]
    if image.mode.startswith("I;16") and "transparency" not in image.info:
        pixels = np.asarray(image).astype(np.float32) * (255 / 65535)
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.mode.startswith("I") or image.mode == "F":
        kind = "floats" if image.mode == "F" else "whole numbers of more than 8 bits"
        raise ValueError(f"its pixels are {kind} without an agreed white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[-1] != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image if image.mode == mode else image.convert(mode)


def upright(image):
    """The image with its EXIF orientation applied. Damaged EXIF data are ignored: the pixels do not need them."""
    from PIL.Image import Transpose

    image.load()  # some formats apply it themselves
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001  raised in many types
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


@contextlib.contextmanager
def naming_damage(name: PathLike | BinaryIO) -> Iterator[None]:
    """Turns errors of decoders into an UnreadableImage that names the image."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  decoders report damage through nearly every type
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        reason = re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", " ".join(reason.split()))  # no addresses
        name = os.fspath(name) if isinstance(name, PathLike) else name
        raise UnreadableImage(f"cannot read the image {name} ({reason}): repair or remove it") from error
