"""The Frechet distance between two Gaussians, in float64, with symmetric eigendecompositions only."""

import numpy as np


class StreamingMoments:
    """Mean and covariance of rows that arrive in batches, in float64 (Chan et al., 1979).

    The result does not depend on how the rows are split, except for rounding.
    """

    def __init__(self, dimensions: int):
        self.count = 0
        self.mean = np.zeros(dimensions)
        self._scatter = np.zeros((dimensions, dimensions))  # sum of (x - mean) (x - mean)^T

    def update(self, features: np.ndarray) -> None:
        """Adds rows [N, D]. Raises ValueError for a wrong shape, or values that are not finite."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be [N, {len(self.mean)}], not {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features contain values that are not finite")
        if not len(features):
            return
        mean = features.mean(axis=0)
        centred = features - mean
        total = self.count + len(features)
        difference = mean - self.mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(difference, difference * (self.count * len(features) / total))
        self.mean = self.mean + difference * (len(features) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """[D, D], divided by N - 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows of features, not {self.count}")
        return self._scatter / (self.count - 1)


def moments(features: np.ndarray, rows: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features [N, D], in float64, `rows` at a time.

    Raises:
      ValueError: features that are not 2-D, fewer than two rows, or values that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], not {features.shape}")
    streaming = StreamingMoments(features.shape[1])
    for first in range(0, len(features), rows):
        streaming.update(features[first : first + rows])
    return streaming.mean, streaming.covariance()


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """The squared Wasserstein-2 distance between N(mean_a, A) and N(mean_b, B), means [D], covariances [D, D]:

        ||mean_a - mean_b||^2 + tr(A) + tr(B) - 2 tr((A^{1/2} B A^{1/2})^{1/2})

    (Dowson & Landau, 1982). Finite for covariances of any rank. Rounding can give a value slightly below 0.
    """
    root = _low_rank_root(np.asarray(covariance_a, np.float64))
    return _distance(mean_a, covariance_a, mean_b, covariance_b, np.linalg.eigvalsh(_product(root, covariance_b)))


def frechet_and_influence(
    features: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray, rows: int = 4096
) -> tuple[float, np.ndarray]:
    """The distance between the Gaussian N(m, A) of features [N, D] and N(mean_b, B), and each row's influence [N]:

        2 (m - mean_b)^T d + d^T (I - T) d - tr((I - T) A),  d = x - m,  T = R^{-T} (R^T B R)^{1/2} R^{-1},  R R^T = A

    It is the derivative of the distance with respect to the weight of x, and has mean 0. T transports the first
    Gaussian to the second. With N rows, the standard error of the distance is std(influence) / sqrt(N).
    """
    mean, covariance = moments(features, rows)
    few = len(features) < len(mean)
    root = _low_rank_root_of_rows(features - mean) if few else _low_rank_root(covariance)
    eigenvalues, eigenvectors = np.linalg.eigh(_product(root, covariance_b))
    whiten = root / (root * root).sum(axis=0)  # [D, rank]: R's pseudo-inverse, transposed; R's columns are orthogonal
    carry = whiten @ (eigenvectors * np.clip(eigenvalues, 0, None) ** 0.25)  # [D, rank], carry @ carry.T = T
    influence = np.empty(len(features))
    for first in range(0, len(features), rows):
        centred = np.asarray(features[first : first + rows], np.float64) - mean
        linear = 2 * centred @ (mean - mean_b)
        influence[first : first + rows] = linear + (centred**2).sum(axis=1) - ((centred @ carry) ** 2).sum(axis=1)
    return _distance(mean, covariance, mean_b, covariance_b, eigenvalues), influence - influence.mean()


def _distance(mean_a, covariance_a, mean_b, covariance_b, eigenvalues) -> float:
    """The distance, given the eigenvalues of A^{1/2} B A^{1/2}."""
    cross_trace = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(difference @ difference + traces - 2 * cross_trace)


def _product(root: np.ndarray, covariance_b: np.ndarray) -> np.ndarray:
    """R^T B R [rank, rank], symmetric to the bit, for R R^T = A.

    A^{1/2} B A^{1/2} has the same non-zero eigenvalues, but also the zeros of A's null space, whose rounding errors a
    square root would amplify from 1e-16 to 1e-8.
    """
    product = root.T @ np.asarray(covariance_b, np.float64) @ root
    return (product + product.T) / 2


def _low_rank_root(covariance: np.ndarray) -> np.ndarray:
    """R [D, rank] with R @ R.T = covariance, without the directions whose variance is rounding error."""
    eigenvalues, eigenvectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = _above_rounding(eigenvalues, len(covariance))
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])


def _low_rank_root_of_rows(centred: np.ndarray) -> np.ndarray:
    """The same for the covariance of rows [N, D] of mean 0, from their N x N products: faster for N < D."""
    scaled = np.asarray(centred, np.float64) / np.sqrt(len(centred) - 1)
    eigenvalues, eigenvectors = np.linalg.eigh(scaled @ scaled.T)
    return scaled.T @ eigenvectors[:, _above_rounding(eigenvalues, scaled.shape[1])]


def _above_rounding(eigenvalues: np.ndarray, dimensions: int) -> np.ndarray:
    """Which eigenvalues of a covariance, in increasing order, are larger than rounding error."""
    return eigenvalues > max(eigenvalues[-1], 0) * dimensions * np.finfo(np.float64).eps
