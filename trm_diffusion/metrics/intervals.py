"""Bootstrap intervals of metrics that are smooth functions of the images' distribution."""

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
