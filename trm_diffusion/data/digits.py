"""The 1,797 scanned 8x8 digits that come with scikit-learn: real data without a download."""

import functools

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_context_element, make_element
from trm_diffusion.errors import UserError

PIXEL_MAX = 16  # a pixel counts the ink cells of a 4x4 block of the scan
TEST_FRACTION = 0.2
NUM_CLASSES = 10

_SPLIT_SEED = 0


@functools.cache
def load_digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loads the digits in a fixed, stratified split of about 80% and 20%.

    Returns:
      train_images [N, 8, 8, 1] float32 in [-1, 1], train_labels [N] int32, test_images, test_labels; all
      four read-only, because every caller in the process shares them.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] * (2 / PIXEL_MAX) - 1).astype(np.float32)  # [N, 8, 8, 1]
    labels = digits.target.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    for class_id in range(NUM_CLASSES):
        members = np.flatnonzero(labels == class_id)
        # Raw generator words are the same in every NumPy version; the shuffles of Generator are not.
        words = np.random.Philox(key=[_SPLIT_SEED, class_id]).random_raw(len(members))
        order = np.argsort(words, kind="stable")
        is_test[members[order[: round(TEST_FRACTION * len(members))]]] = True
    split = (images[~is_test], labels[~is_test], images[is_test], labels[is_test])
    for array in split:
        array.setflags(write=False)
    return split


class DigitsSource(Source):
    """The train or test part of `load_digits_split`, in memory; `index` counts from 0 within the part.

    with_context: each record has the digit at 4x4 as its context image, enlarged to 8x8 [8, 8, 1]: super-resolution.
    """

    in_memory = True
    has_context = True
    held_out_split = "test"

    def __init__(self, split: str = "train", *, with_context: bool = False):
        if split not in ("train", "test"):
            raise UserError(f"config.data.split={split!r}: the digits have the splits train and test")
        train_images, train_labels, test_images, test_labels = load_digits_split()
        self._images = train_images if split == "train" else test_images
        self._labels = train_labels if split == "train" else test_labels
        self.sample_shape = self._images.shape[1:]
        self.num_classes = NUM_CLASSES
        self.context_channels = int(with_context)
        self.mirrored = ("image", "context") if with_context else ("image",)

    @classmethod
    def from_config(cls, config: DataConfig) -> "DigitsSource":
        return cls(config.split, with_context=config.context_channels > 0)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Element:
        image, label = self._images[index], self._labels[index]
        if not self.context_channels:
            return make_element(image, label, index)
        small = image.reshape(4, 2, 4, 2, 1).mean((1, 3))
        return make_context_element(image, small.repeat(2, 0).repeat(2, 1), label, index)
