"""The Frechet distance between two Gaussians, in float64 and by symmetric eigen-decompositions only."""

import numpy as np


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features [N, D], computed in float64.

    Raises:
      ValueError: another number of dimensions, fewer than two rows, or values that are not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments needs features [N >= 2, D], not {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are not finite")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """The squared Wasserstein-2 distance of N(mean_a, A) and N(mean_b, B), means [D], covariances [D, D]:

        ||mean_a - mean_b||^2 + tr(A) + tr(B) - 2 tr((A^{1/2} B A^{1/2})^{1/2})

    (Dowson & Landau, 1982). Finite for covariances of any rank. Rounding can leave a value a little below 0.
    """
    root = _low_rank_root(np.asarray(covariance_a, np.float64))  # [D, rank], root @ root.T = A
    # A^{1/2} B A^{1/2} and root.T B root have the same non-zero eigenvalues, and the small matrix has none of
    # the zeros of A's null space, whose rounding errors a square root would blow up from 1e-16 to 1e-8.
    product = root.T @ np.asarray(covariance_b, np.float64) @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    cross_trace = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(difference @ difference + traces - 2 * cross_trace)


def _low_rank_root(covariance: np.ndarray) -> np.ndarray:
    """R [D, rank] with R @ R.T = covariance, without the directions whose variance is rounding error."""
    eigenvalues, eigenvectors = np.linalg.eigh((covariance + covariance.T) / 2)
    floor = max(eigenvalues[-1], 0) * len(covariance) * np.finfo(np.float64).eps
    kept = eigenvalues > floor
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])
