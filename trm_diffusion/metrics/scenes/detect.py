"""Detects the objects of a scene without any learned part: threshold, connected components, template fit.

A component is an object if one template (a shape with some radius and sub-pixel position in one flat colour) explains
it up to noise, and if the colour is in the palette. Everything else that stands out from the background counts as
unrecognised.
"""

import dataclasses
import functools

import numpy as np
import scipy.ndimage

from trm_diffusion.data.scenes.shapes import BACKGROUND, COLORS, coverage
from trm_diffusion.data.scenes.source import RADIUS_RANGE, SHAPES_BY_SIZE, Object
from trm_diffusion.errors import UserError

MIN_FIT = 0.97  # R^2 of the template, corrected for noise; `metrics.scenes --selfcheck` prints the sweep
MAX_COLOR_DISTANCE = 0.25  # to the palette, RGB in [0, 1]; palette colours are at least 0.41 apart
# In [0, 1] RGB; less than half of the smallest distance from grey to a colour, so that edges are found about midway.
THRESHOLD = 0.25

GRID = {32: 0.25, 64: 0.375}  # image size: step of the templates' radii and positions, in pixels
MAX_SHIFT = 3  # in these steps: half a pixel of rounding, and the error of a noisy centroid
RADIUS_SLACK = 1  # in these steps, beyond the range of drawn radii

# In pixels of a 32x32 image; at 64x64 lengths are doubled and areas quadrupled.
BLUR = 0.6  # sigma before the threshold
MIN_AREA = 3.0  # smaller components are specks of noise, not objects

MAX_NOISE = 0.12  # sigma in [0, 1] RGB; noise beyond this counts against the fit
_NOISE_SIGMAS = 4  # the residual may exceed its expectation under noise by this many standard deviations
_IMAGES_AT_ONCE = 512
_COMPONENTS_AT_ONCE = 256
_PLANE = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]).astype(bool)  # 8-connected, images separate


@dataclasses.dataclass(frozen=True)
class Detection:
    """The objects recognised in one image, and the number of unrecognised blobs."""

    objects: tuple[Object, ...]
    unrecognised: int = 0


@dataclasses.dataclass(frozen=True)
class Fit:
    """The best template of one component; the object's colour is "" if no palette colour is near."""

    image: int
    best: Object
    r_squared: float  # -inf for a component larger than any template

    def is_object(self, min_fit: float = MIN_FIT) -> bool:
        return self.r_squared >= min_fit and bool(self.best.color)


def detect(images: np.ndarray, min_fit: float = MIN_FIT) -> list[Detection]:
    """Detects the objects of each image.

    Args:
      images: [N, S, S, 3] in [-1, 1], S = 32 or 64; values outside are clipped.
      min_fit: the smallest R^2 of an object.

    Raises:
      UserError: an unsupported image size, or values that are not finite.
    """
    return group(fit_components(images), len(images), min_fit)


def group(fits: list[Fit], num_images: int, min_fit: float = MIN_FIT) -> list[Detection]:
    """Groups fits by image, and splits them into objects and unrecognised blobs."""
    by_image = [[] for _ in range(num_images)]
    for fit in fits:
        by_image[fit.image].append(fit)
    return [
        Detection(
            tuple(fit.best for fit in found if fit.is_object(min_fit)),
            sum(not fit.is_object(min_fit) for fit in found),
        )
        for found in by_image
    ]


def fit_components(images: np.ndarray) -> list[Fit]:
    """Fits the template bank to every connected component of every image; arguments as in `detect`."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] not in [(size, size, 3) for size in SHAPES_BY_SIZE]:
        raise UserError(f"scenes must be [N, 32, 32, 3] or [N, 64, 64, 3], not {images.shape}")
    if not np.isfinite(images).all():
        raise UserError("some images are not finite: the model or the sampler diverged; evaluate an earlier checkpoint")
    fits = []
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        fits += _fit_images(images[start : start + _IMAGES_AT_ONCE], start)
    return fits


def _fit_images(images: np.ndarray, first: int) -> list[Fit]:
    """`fit_components` for a few images, numbered from `first`."""
    scale = images.shape[1] / 32
    contrast = (np.clip(images, -1, 1) + 1) / 2 - BACKGROUND  # [N, S, S, 3]
    blurred = scipy.ndimage.gaussian_filter(contrast, (0, BLUR * scale, BLUR * scale, 0))
    labels, count = scipy.ndimage.label(np.linalg.norm(blurred, axis=-1) > THRESHOLD, _PLANE)  # [N, S, S]
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    ids = np.flatnonzero(areas >= MIN_AREA * scale**2) + 1
    if not len(ids):
        return []
    noise_n = _noise_variance(contrast, labels)
    boxes = scipy.ndimage.find_objects(labels)
    centroids = np.array(scipy.ndimage.center_of_mass(labels > 0, labels, ids))  # [K, 3]: image, row, column
    fits = []
    for start in range(0, len(ids), _COMPONENTS_AT_ONCE):
        chunk = slice(start, start + _COMPONENTS_AT_ONCE)
        fits += _fit_chunk(contrast, labels, noise_n, ids[chunk], centroids[chunk], boxes, first)
    return fits


def _noise_variance(contrast: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each image's noise variance [N], from the median deviation of the pixels away from all components."""
    near = scipy.ndimage.binary_dilation(labels > 0, _PLANE, iterations=2)
    deviation = np.where(near[..., None], np.nan, abs(contrast)).reshape(len(contrast), -1)
    deviation[near.all(axis=(1, 2))] = 0
    sigma = np.nanmedian(deviation, axis=1) / 0.6745  # the median of |N(0, 1)|
    return np.minimum(sigma, MAX_NOISE) ** 2


@functools.cache
def _bank(size: int) -> tuple[list[tuple[str, float, float, float]], np.ndarray, int]:
    """Templates for images of one size.

    Returns:
      (shape, radius, x, y) of each template, with its centre relative to the window's middle pixel; the templates
      [W * W, T] float32, of unit length; and W, odd.
    """
    scale = size / 32
    grid = GRID[size]
    low, high = (bound * scale for bound in RADIUS_RANGE)
    radii = np.arange(low - RADIUS_SLACK * grid, high + (RADIUS_SLACK + 0.5) * grid, grid)
    shifts = np.arange(-MAX_SHIFT, MAX_SHIFT + 1) * grid
    half = int(np.ceil(radii[-1] + 2 * shifts[-1])) + 2
    pixels = np.arange(-half, half + 1)
    y, x = np.meshgrid(pixels, pixels, indexing="ij")  # [W, W]
    names, templates = [], []
    for shape in SHAPES_BY_SIZE[size]:
        for radius in radii:
            mask = coverage(shape, x, y, radius)
            # Windows are centred on centroids, which are not the centres of triangles and stars.
            rise = (mask * y).sum() / mask.sum()
            for shift_y in shifts - rise:
                for shift_x in shifts:
                    template = coverage(shape, x - shift_x, y - shift_y, radius)
                    templates.append((template / np.linalg.norm(template)).ravel())
                    names.append((shape, float(radius), float(shift_x), float(shift_y)))
    return names, np.stack(templates, axis=1).astype(np.float32), 2 * half + 1


def _fit_chunk(contrast, labels, noise_n, ids, centroids, boxes, first) -> list[Fit]:
    """Fits the template bank to components `ids` [K] of a few images, numbered from `first`."""
    names, templates_pt, width = _bank(contrast.shape[1])
    half = width // 2
    at = np.round(centroids).astype(int)  # [K, 3]
    patches, owned = _windows(contrast, labels, ids, at, half)  # [K, W, W, 3], [K, W, W]
    signal_kpc = (patches * owned[..., None]).reshape(len(ids), -1, 3)
    mean_kc = signal_kpc.sum(axis=1)
    direction_kc = mean_kc / np.maximum(np.linalg.norm(mean_kc, axis=-1, keepdims=True), 1e-12)
    # An object has one flat colour: no template can explain what is off the direction of the mean colour.
    projected_kt = np.einsum("kpc,kc->kp", signal_kpc, direction_kc) @ templates_pt
    best_k = projected_kt.argmax(axis=1)
    height_k = projected_kt.max(axis=1)  # a unit template t explains (t . y)^2 of y, at amplitude (t . y) max(t)
    total_k = (signal_kpc**2).sum(axis=(1, 2))
    residual_k = total_k - height_k**2
    values_k = 3 * owned.sum(axis=(1, 2))
    noise_k = noise_n[at[:, 0]]
    excess_k = residual_k - noise_k * (values_k + _NOISE_SIGMAS * np.sqrt(2 * values_k))
    r_squared_k = 1 - np.maximum(excess_k, 0) / np.maximum(total_k - noise_k * values_k, 1e-12)
    fits = []
    for k, (image, row, column) in enumerate(at.tolist()):
        shape, radius, x, y = names[best_k[k]]
        color = BACKGROUND + direction_kc[k] * height_k[k] * templates_pt[:, best_k[k]].max()
        _, rows, columns = boxes[ids[k] - 1]
        too_large = max(rows.stop - rows.start, columns.stop - columns.start) > width
        best = Object(shape, _nearest_color(color), column + 0.5 + x, row + 0.5 + y, radius)
        fits.append(Fit(first + image, best, -np.inf if too_large else float(r_squared_k[k])))
    return fits


def _windows(contrast, labels, ids, at, half) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a window around each component: contrast [K, W, W, 3] (0 outside the image), and its own pixels [K, W, W].

    Its own pixels are those within two pixels of the component: they include its soft edge, but no other object's.
    """
    padding = ((0, 0), (half, half), (half, half))
    padded = np.pad(contrast, (*padding, (0, 0)))
    span = np.arange(2 * half + 1)
    index = at[:, 0, None, None], at[:, 1, None, None] + span[:, None], at[:, 2, None, None] + span
    owned = np.pad(labels, padding)[index] == ids[:, None, None]
    return padded[index], scipy.ndimage.binary_dilation(owned, _PLANE, iterations=2)


def _nearest_color(color: np.ndarray) -> str:
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in COLORS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= MAX_COLOR_DISTANCE else ""
