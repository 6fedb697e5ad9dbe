"""Noise instead of images, for benchmarks and tests without data."""

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_element

_SEED = 20_231


class SyntheticSource(Source):
    """Standard normal noise that depends only on the record's index. Classes, if any, occur equally often.

    It isolates the loader and the model from storage. Its values are not bounded by [-1, 1].
    """

    def __init__(self, sample_shape: tuple[int, int, int], num_classes: int, num_records: int):
        self.sample_shape = sample_shape
        self.num_classes = num_classes
        self._num_records = num_records

    @classmethod
    def from_config(cls, config: DataConfig) -> "SyntheticSource":
        shape = (config.image_size, config.image_size, config.channels)
        return cls(shape, config.num_classes, config.synthetic_records)

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> Element:
        key = np.array([_SEED, index], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        image = rng.standard_normal(self.sample_shape, np.float32)
        return make_element(image, index % max(1, self.num_classes), index)
