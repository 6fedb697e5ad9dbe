"""A source outside the package, as a user would add one in a single file."""

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_element


class StripesSource(Source):
    """Black and white rows (class 0) or columns (class 1)."""

    num_classes = 2

    def __init__(self, image_size: int):
        self.sample_shape = (image_size, image_size, 1)

    @classmethod
    def from_config(cls, config: DataConfig) -> "StripesSource":
        return cls(config.image_size)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Element:
        rows, columns = np.indices(self.sample_shape[:2])
        bands = columns if index else rows
        return make_element(np.where(bands[..., None] % 2, 1.0, -1.0), index, index)
