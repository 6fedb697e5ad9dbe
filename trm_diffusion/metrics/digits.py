"""Evaluation of generated digits: class accuracy, Frechet distance, memorisation, and accuracy of the judge itself.

The judge, the reference statistics and the neighbours all come from the real training split; the real test
split shows how well a perfect generator would do. None of this is an FID: the Frechet distance is computed in
the 64-dimensional space of raw pixels, on the scanner's 0 .. 16 scale.
"""

import functools

import numpy as np

from trm_diffusion.data.digits import NUM_CLASSES, PIXEL_MAX, load_digits_split
from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256
from trm_diffusion.metrics.frechet import frechet_distance, moments
from trm_diffusion.metrics.judges import Evaluation, Judge, Picture

JUDGE = "scikit-learn SVC(rbf, C=10, gamma=0.001) on 0..16 pixels of the training split"
ROWS_SHOWN = 10


class DigitsJudge(Judge):
    """Class accuracy by a judge trained on real digits, Frechet distance, memorisation."""

    sources = ("digits",)
    condition = "label"

    def evaluate(self, generate):
        labels = self.labels()
        images = generate(labels)
        measures = evaluate_digits(images, labels)
        passed = (
            measures["class_accuracy"] >= self.settings.min_class_accuracy
            and measures["judge_test_accuracy"] >= self.settings.min_judge_accuracy
        )
        return Evaluation(measures, passed, {"evaluation": Picture(self._shown(images, labels))})

    def _shown(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """One row per class if all classes have the same number of images; otherwise the first images."""
        if self.settings.label_rule == "balanced" and len(labels) % self.data.num_classes == 0:
            by_class = np.argsort(labels, kind="stable").reshape(self.data.num_classes, -1)
            images = images[by_class[:, : self.per_class].reshape(-1)]
        return images[: ROWS_SHOWN * self.per_class]


def evaluate_digits(images: np.ndarray, labels: np.ndarray) -> dict:
    """Measures generated digits against the real ones.

    Args:
      images: [N, 8, 8, 1], N >= 2, nominally in [-1, 1]; clipped to that, then mapped to 0 .. 16 pixels.
      labels: [N] integers 0 .. 9, the requested classes.

    Returns:
      A dict for JSON:
        num_images: N.
        class_accuracy: share of images in which the judge sees the requested class.
        class_accuracy_per_class: the same for each class; None if it was not requested.
        judge, judge_test_accuracy: the judge, and its accuracy on the real test split.
        frechet_pixels64: Frechet distance to the training split, raw 0 .. 16 pixels, 64 dimensions.
        frechet_pixels64_floor: the same for the real test split, all its 359 images. The distance falls
          with N, so compare it with the floor at a similar N.
        nearest_train_median, nearest_train_q05: median and 5% quantile of the Euclidean distance, in 0 .. 16
          pixels, from a generated image to the nearest training image.
        real_test_nearest_train_median, _q05, _q01: the same for the real test split, and its 1% quantile.
        nearer_than_real_q05, nearer_than_real_q01: share of generated images nearer to a training image than
          those quantiles; 0.05 and 0.01 for real images, more where training images are memorised.
        reference_sha256: of the training split's pixels, uint8 0 .. 16 in C order.

    Raises:
      UserError: images that are not finite.
      ValueError: wrong shapes, fewer than two images, or labels out of range.
    """
    images, labels = np.asarray(images, np.float64), np.asarray(labels)
    _check(images, labels)
    pixels = _to_pixels(images)  # [N, 64]
    train_pixels, train_mean, train_covariance, train_sha256 = _reference()
    judge, judge_test_accuracy, test_nearest, floor = _real_test()

    is_right = judge.predict(pixels) == labels
    per_class = [is_right[labels == class_id] for class_id in range(NUM_CLASSES)]
    nearest = _nearest_distances(pixels, train_pixels)
    real_q01, real_q05 = np.quantile(test_nearest, [0.01, 0.05])
    return {
        "num_images": len(images),
        "class_accuracy": float(is_right.mean()),
        "class_accuracy_per_class": [float(right.mean()) if len(right) else None for right in per_class],
        "judge": JUDGE,
        "judge_test_accuracy": judge_test_accuracy,
        "frechet_pixels64": frechet_distance(*moments(pixels), train_mean, train_covariance),
        "frechet_pixels64_floor": floor,
        "nearest_train_median": float(np.median(nearest)),
        "nearest_train_q05": float(np.quantile(nearest, 0.05)),
        "real_test_nearest_train_median": float(np.median(test_nearest)),
        "real_test_nearest_train_q05": float(real_q05),
        "real_test_nearest_train_q01": float(real_q01),
        "nearer_than_real_q05": float((nearest < real_q05).mean()),
        "nearer_than_real_q01": float((nearest < real_q01).mean()),
        "reference_sha256": train_sha256,
    }


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[1:] != (8, 8, 1) or len(images) < 2:
        raise ValueError(f"images must be [N >= 2, 8, 8, 1], not {images.shape}")
    if labels.shape != images.shape[:1] or not np.isin(labels, np.arange(NUM_CLASSES)).all():
        raise ValueError(f"labels must be {len(images)} integers 0 .. {NUM_CLASSES - 1}")
    broken = ~np.isfinite(images).all(axis=(1, 2, 3))
    if broken.any():
        raise UserError(
            f"{broken.sum()} of {len(images)} generated digits are not finite (the first is number "
            f"{broken.argmax()}): the model or the sampler diverged; evaluate an earlier checkpoint"
        )


def _to_pixels(images: np.ndarray) -> np.ndarray:
    """[N, 8, 8, 1] in [-1, 1] -> [N, 64] float64 in 0 .. 16."""
    clipped = np.clip(np.asarray(images, np.float64), -1, 1)
    return (clipped.reshape(len(images), -1) + 1) * (PIXEL_MAX / 2)


@functools.cache
def _reference() -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """The training split: pixels [N, 64], their mean [64] and covariance [64, 64], and their sha256."""
    pixels = _to_pixels(load_digits_split()[0])
    digest = sha256([np.round(pixels).astype(np.uint8).tobytes()])
    return pixels, *moments(pixels), digest


@functools.cache
def _real_test() -> tuple[object, float, np.ndarray, float]:
    """The fitted judge, its accuracy, nearest distances [N] and Frechet distance of the real test split."""
    from sklearn.svm import SVC

    _, train_labels, test_images, test_labels = load_digits_split()
    train_pixels, train_mean, train_covariance, _ = _reference()
    test_pixels = _to_pixels(test_images)
    judge = SVC(kernel="rbf", C=10.0, gamma=1e-3).fit(train_pixels, train_labels)
    accuracy = float((judge.predict(test_pixels) == test_labels).mean())
    nearest = _nearest_distances(test_pixels, train_pixels)
    floor = frechet_distance(*moments(test_pixels), train_mean, train_covariance)
    return judge, accuracy, nearest, floor


def _nearest_distances(pixels: np.ndarray, train_pixels: np.ndarray) -> np.ndarray:
    """Euclidean distance [N] from each row of pixels [N, 64] to the nearest of train_pixels [M, 64]."""
    nearest = []
    for chunk in np.array_split(pixels, max(1, len(pixels) // 1024)):
        # Differences, not the expanded square: a copy of a training image must give exactly 0.
        index = _squared_distances(chunk, train_pixels).argmin(axis=1)
        nearest.append(np.linalg.norm(chunk - train_pixels[index], axis=1))
    return np.concatenate(nearest)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, D], [M, D] -> [N, M], by the expanded square; its rounding error is small enough for ranking."""
    return (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :] - 2 * a @ b.T
