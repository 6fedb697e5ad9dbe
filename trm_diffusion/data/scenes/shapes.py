"""Rendering of scenes: eight flat shapes in ten colours on a grey background."""

from collections.abc import Callable

import numpy as np

# The ten colour names of GenEval. Values in [0, 1]; the smallest distance between two, or to the grey, is 0.41.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (1.00, 0.95, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "purple": (0.50, 0.10, 0.65),
    "pink": (1.00, 0.60, 0.80),
    "brown": (0.40, 0.22, 0.05),
    "black": (0.00, 0.00, 0.00),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUND = 0.5

_SQRT2, _SQRT5 = 2**0.5, 5**0.5


def _circle(x, y, r):
    return np.hypot(x, y) - r


def _square(x, y, r):
    return np.maximum(abs(x), abs(y)) - 0.9 * r


def _triangle(x, y, r):
    return np.maximum(y - r, (2 * abs(x) - y - r) / _SQRT5)


def _cross(x, y, r):
    longer, shorter = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(longer - r, shorter - 0.36 * r)


def _ring(x, y, r):
    return abs(np.hypot(x, y) - 0.72 * r) - 0.28 * r


def _star(x, y, r):
    # Fold the plane onto half of one point; there the outline is the line from the tip to the notch.
    angle = abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    notch_along, notch_across = 0.45 * r * np.cos(np.pi / 5), 0.45 * r * np.sin(np.pi / 5)
    length = np.hypot(r - notch_along, notch_across)
    return ((along - r) * notch_across + across * (r - notch_along)) / length


def _diamond(x, y, r):
    return (abs(x) / 0.75 + abs(y) - r) / np.hypot(1 / 0.75, 1)


def _bar(x, y, r):
    return np.maximum(abs(x) - r, abs(y) - 0.36 * r)


# Distance in pixels from (x, y), relative to the shape's centre, y downwards, to the outline of a shape of
# radius r; negative inside. Outside, near corners, it is too small, which keeps corners sharp.
_DISTANCES: dict[str, Callable] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
    "diamond": _diamond,
    "bar": _bar,
}
SHAPES = tuple(_DISTANCES)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """The share of each unit pixel inside a shape, from the distance of the pixel's centre to the outline.

    Args:
      shape: one of SHAPES.
      x, y: pixel centres relative to the shape's centre in pixels, y downwards; any shapes that broadcast.
      radius: half of the shape's larger extent, in pixels.

    Returns:
      Values in [0, 1] of the broadcast shape: clip(1/2 - distance, 0, 1).
    """
    return np.clip(0.5 - _DISTANCES[shape](x, y, radius), 0, 1)


def render(objects, image_size: int) -> np.ndarray:
    """Draws objects (shape, color, x, y, radius) on grey: float32 [image_size, image_size, 3] in [-1, 1]."""
    centres = np.arange(image_size, dtype=np.float32) + 0.5
    image = np.full((image_size, image_size, 3), BACKGROUND, np.float32)
    for item in objects:
        mask = coverage(item.shape, centres[None, :] - item.x, centres[:, None] - item.y, item.radius)[..., None]
        image += mask * (np.array(COLORS[item.color], np.float32) - image)
    return 2 * image - 1
