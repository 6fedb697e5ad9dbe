"""95% intervals of metrics: by bootstrap, and exact ones of shares."""

import numpy as np


def bootstrap_interval(value: float, influence: np.ndarray, resamples: int = 1000, seed: int = 0) -> list[float]:
    """The 95% interval of a metric under resampling of the images: value + the central quantiles of mean(influence).

    The metric is linearised in the images' weights, with the given influence [N] (of mean 0) of each image, so a
    resample only costs a mean. The interval covers the noise of the drawn images, not the bias of a small N.
    """
    rng = np.random.default_rng(seed)
    count = len(influence)
    means = [influence[rng.integers(0, count, count)].mean() for _ in range(resamples)]
    return [float(value + quantile) for quantile in np.quantile(means, [0.025, 0.975])]


def share_with_interval(name: str, hits: np.ndarray) -> dict:
    """{name: share of the hits, bool [N], NAME_95: Clopper and Pearson's interval}."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(confidence_level=0.95)
    return {name: float(hits.mean()), f"{name}_95": [float(interval.low), float(interval.high)]}
