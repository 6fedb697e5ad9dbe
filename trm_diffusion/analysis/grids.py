"""Pictures of samples: grids of images, with or without captions, and PNG files."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.files import PathLike, replacing

MARK = "trm_diffusion"  # keyword of the text in a PNG that says which image it is
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk, always the same


def image_grid(
    images: np.ndarray, columns: int, *, scale: int = 1, padding: int = 2, background: int = 255
) -> np.ndarray:
    """Lays images out row by row.

    Args:
      images: [N, H, W, C] in [-1, 1]; 1 channel is grey, 3 are RGB. With 4 or more (latents) the first three
        are shown, each stretched from its own 1 .. 99% range over all images, so colours can be compared
        within a grid but not between grids.
      columns: images per row.
      scale: each pixel becomes scale x scale pixels.
      padding: pixels between and around the images, not scaled.
      background: grey value 0 .. 255 of the padding and of empty places.

    Returns:
      uint8 [H', W', 3], values clip(127.5 x + 128, 0, 255) rounded down.

    Raises:
      UserError: an image holds values that are not finite.
    """
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"columns={columns}, scale={scale} must be positive, padding={padding} not negative")
    return _lay_out(_pixels(images, scale), columns, padding, background)


def captioned_grid(images: np.ndarray, captions: Sequence[str], columns: int, *, scale: int = 1) -> np.ndarray:
    """`image_grid` with a caption [N] printed under each image, wrapped to the width of the image."""
    from PIL import Image, ImageDraw, ImageFont

    pixels = _pixels(images, scale)
    font = ImageFont.load_default()
    width = pixels.shape[2]
    texts = [_wrapped(caption, lambda line: font.getlength(line) <= width) for caption in captions]
    line_height = sum(font.getmetrics()) + 1
    strip = line_height * max(map(len, texts)) + 2
    labelled = []
    for image, lines in zip(pixels, texts, strict=True):
        below = Image.new("L", (width, strip), 255)
        for number, line in enumerate(lines):
            ImageDraw.Draw(below).text((0, number * line_height), line, fill=0, font=font)
        labelled.append(np.concatenate([image, np.repeat(np.asarray(below)[..., None], 3, axis=2)]))
    return _lay_out(np.stack(labelled), columns, padding=6, background=255)


def stacked(*kinds: np.ndarray) -> np.ndarray:
    """Images of several kinds, each [N, H, W, C] and of one width, under each other with a grey line between them.

    Returns float32 [N, sum of (H + 1) - 1, W, 3]. One channel is shown in grey; two are red and green; of more, the
    first three are shown.
    """
    parts = [_three_channels(np.asarray(images, np.float32)) for images in kinds]
    line = np.zeros_like(parts[0][:, :1])
    return np.concatenate([part for images in parts for part in (line, images)][1:], axis=1)


def _three_channels(images: np.ndarray) -> np.ndarray:
    count = images.shape[-1]
    if count == 1:
        return np.repeat(images, 3, axis=-1)
    return np.pad(images[..., :3], [(0, 0)] * 3 + [(0, max(0, 3 - count))], constant_values=-1)


def _wrapped(text: str, fits) -> list[str]:
    """Breaks a text into lines that fit, with at least one word each."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and not fits(longer):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def check_finite(images: np.ndarray, names: Sequence[str] = ()) -> None:
    """Raises UserError if one of the images [N, ...] holds NaN or an infinity; names [N]: by default their numbers."""
    bad = np.flatnonzero(~np.isfinite(images).all(axis=tuple(range(1, np.ndim(images)))))
    if len(bad):
        first = names[bad[0]] if names else f"number {bad[0]}"
        raise UserError(
            f"{len(bad)} of {len(images)} images hold values that are not finite, the first is {first}: use an earlier "
            "checkpoint, whose parameters are sound, or config.model.dtype=float32 if bfloat16 overflows"
        )


def to_uint8(image: np.ndarray, name: str = "") -> np.ndarray:
    """One image [H, W, C] as `image_grid` shows it, uint8 [H, W, 3]. Raises UserError, by name, if it is not finite."""
    check_finite(image[None], [name] if name else ())
    return _pixels(image[None], scale=1)[0]


def _pixels(images: np.ndarray, scale: int) -> np.ndarray:
    """[N, H, W, C] in [-1, 1], or latents, -> uint8 [N, H * scale, W * scale, 3]."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] in (0, 2) or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W, C] with 1, 3 or more channels, not {images.shape}")
    check_finite(images)
    if images.shape[-1] > 3:
        images = _stretch(images[..., :3])
    pixels = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def _lay_out(pixels: np.ndarray, columns: int, padding: int, background: int) -> np.ndarray:
    """Places uint8 [N, H, W, 3] row by row on one picture."""
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    row_step, column_step = height + padding, width + padding
    shape = (rows * row_step + padding, columns * column_step + padding, 3)
    grid = np.full(shape, background, np.uint8)
    for number, image in enumerate(pixels):
        row, column = divmod(number, columns)
        top, left = padding + row * row_step, padding + column * column_step
        grid[top : top + height, left : left + width] = image
    return grid


def _stretch(images: np.ndarray) -> np.ndarray:
    """Maps each channel's 1 .. 99% range to [-1, 1]; a constant channel becomes 0."""
    low, high = np.percentile(images, [1, 99], axis=(0, 1, 2))  # [C] each
    half_range = (high - low) / 2
    centred = images - (low + high) / 2
    return np.where(half_range > 0, centred / np.where(half_range > 0, half_range, 1), 0)


def save_png(path: PathLike, array: np.ndarray, mark: str = "") -> None:
    """Writes uint8 [H, W, 3] or [H, W] to `path` atomically, with a mark as text. Creates the directory if needed."""
    from PIL import Image, PngImagePlugin

    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise ValueError(f"a PNG needs uint8 values, not {array.dtype}")
    text = PngImagePlugin.PngInfo()
    if mark:
        text.add_text(MARK, mark)
    with replacing(path) as partial, partial.open("wb") as file:
        Image.fromarray(array).save(file, format="PNG", pnginfo=text)


def mark_of_png(path: PathLike) -> str | None:
    """The mark of a PNG; None if it has none, or if the file is missing, cut off or fails a checksum of PNG."""
    from PIL import Image

    try:
        data = epath.Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            mark = image.info.get(MARK)
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # PIL reports damage through all of these
        return None
    return mark if data.endswith(PNG_END) else None
