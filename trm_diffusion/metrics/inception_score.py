"""The inception score (Salimans et al., 2016)."""

import numpy as np
from scipy.special import log_softmax, xlogy

CHUNK_IMAGES = 5000


def inception_score(logits: np.ndarray, chunk_images: int = CHUNK_IMAGES) -> tuple[float, np.ndarray]:
    """The score of logits [N, classes], and the influence of each image on it.

        exp(mean_i KL(p_i || mean_j p_j)),  p = softmax(logits),

    in float64, averaged over contiguous chunks in the given order; the last chunk may be smaller. The order matters:
    images sorted by class score lower.

    Returns:
      The score, and its influence [N] (mean 0): N times the derivative with respect to the weight of each image.
    """
    chunks = [logits[first : first + chunk_images] for first in range(0, len(logits), chunk_images)]
    scores, influences = zip(*map(_chunk_score, chunks), strict=True)
    # Each chunk has weight 1 / len(chunks) in the mean, and len(chunk) / N of the images.
    shares = [len(logits) / (len(chunks) * len(chunk)) for chunk in chunks]
    influence = np.concatenate([share * values for share, values in zip(shares, influences, strict=True)])
    return float(np.mean(scores)), influence


def _chunk_score(logits: np.ndarray) -> tuple[float, np.ndarray]:
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    p = np.exp(log_p)
    mean_p = p.mean(axis=0)
    log_mean_p = np.log(np.where(mean_p > 0, mean_p, 1))  # a class without probability mass adds nothing
    divergence = xlogy(p, p).sum(axis=1) - p @ log_mean_p
    score = np.exp(divergence.mean())
    return score, score * (divergence - divergence.mean())
