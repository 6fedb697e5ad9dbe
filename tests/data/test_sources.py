"""Sources follow one contract: element names, shapes, dtypes, ranges, and a config that matches the data."""

import pickle
import subprocess
import sys

import chex
import numpy as np
import pytest

from tests.jobs.tiny import ROOT
from trm_diffusion.data.base import DataConfig, Source
from trm_diffusion.data.digits import load_digits_split
from trm_diffusion.data.registry import SOURCES
from trm_diffusion.data.sources import CAPTIONED_SOURCES, make_source, source_class
from trm_diffusion.errors import UserError


def test_element_contract():
    for config in (DataConfig(), DataConfig(source="synthetic", image_size=4, channels=3, num_classes=7)):
        source = make_source(config)
        element = source[11]
        assert set(element) == {"image", "label", "index"}
        chex.assert_shape(element["image"], (config.image_size, config.image_size, config.channels))
        chex.assert_shape([element["label"], element["index"]], ())
        chex.assert_type([element["image"], element["label"], element["index"]], [np.float32, int, int])
        assert element["label"].dtype == element["index"].dtype == np.int32
        assert element["index"] == 11 and source.sample_shape == element["image"].shape


def test_digits_split_is_stratified_disjoint_and_complete():
    from sklearn.datasets import load_digits

    train_images, train_labels, test_images, test_labels = load_digits_split()
    chex.assert_shape([train_images, test_images], (None, 8, 8, 1))
    chex.assert_type([train_images, test_images], np.float32)
    assert train_images.min() == -1 and train_images.max() == 1
    test_share = np.bincount(test_labels) / np.bincount(np.concatenate([train_labels, test_labels]))
    np.testing.assert_allclose(test_share, 0.2, atol=0.005)
    rows = np.concatenate([train_images, test_images]).reshape(-1, 64)
    raw = load_digits().images.reshape(-1, 64)
    np.testing.assert_array_equal(np.sort((rows + 1) * 8, axis=0), np.sort(raw, axis=0))
    assert len(rows) == 1797


def test_digits_to_enlarge_have_their_means_as_context():
    plain, source = (make_source(DataConfig(context_channels=channels)) for channels in (0, 1))
    for index in (0, 700):
        record = source[index]
        assert record.keys() == plain[index].keys() | {"context"} and record["context"].dtype == np.float32
        np.testing.assert_array_equal(record["image"], plain[index]["image"])
        for row, column in np.ndindex(4, 4):
            block = np.s_[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(record["context"][block], record["image"][block].mean(), atol=1e-6)
    with pytest.raises(UserError, match="set config.data.context_channels=1"):
        make_source(DataConfig(context_channels=3))


def test_digits_labels_belong_to_their_images():
    """Class means of the two splits agree; swapped labels would mix them."""
    train_images, train_labels, test_images, test_labels = load_digits_split()
    train_means = np.stack([train_images[train_labels == c].mean(0) for c in range(10)]).reshape(10, 64)
    test_means = np.stack([test_images[test_labels == c].mean(0) for c in range(10)]).reshape(10, 64)
    distances = np.linalg.norm(train_means[:, None] - test_means[None], axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), np.arange(10))


def test_digits_splits_are_different_records():
    train, test = make_source(DataConfig()), make_source(DataConfig(split="test"))
    assert (len(train), len(test)) == (1438, 359)
    assert not np.array_equal(train[0]["image"], test[0]["image"])


def test_synthetic_is_standard_normal_balanced_and_reproducible():
    config = DataConfig(source="synthetic", image_size=16, channels=2, num_classes=5, synthetic_records=50)
    source = make_source(config)
    images = np.stack([source[i]["image"] for i in range(50)])
    assert abs(images.mean()) < 0.03 and abs(images.std() - 1) < 0.03
    assert np.bincount([source[i]["label"] for i in range(50)]).tolist() == [10] * 5
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[7]["image"], images[7])
    assert len(np.unique(images.reshape(50, -1)[:, 0])) == 50


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 16}, "config.data.image_size=8"),
        ({"channels": 3}, "config.data.channels=1"),
        ({"num_classes": 11}, "config.data.num_classes=10"),
        ({"split": "validation"}, "train and test"),
        ({"source": "tfds", "channels": 4}, "config.data.channels=4"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, says):
    with pytest.raises(UserError) as caught:
        make_source(DataConfig(**changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "imagenet"}, "choose one of digits, synthetic, image_folder, image_tars, tfds, latents"),
        ({"workers": -1}, "workers is -1"),
        ({"synthetic_records": 0}, "synthetic_records is 0"),
    ],
)
def test_a_field_out_of_range_is_refused_in_one_line(changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        DataConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SOURCES)
def test_every_name_of_the_registry_is_a_source(name):
    kind = source_class(name)
    assert issubclass(kind, Source) and callable(kind.from_config)
    assert kind.captioned == (name in CAPTIONED_SOURCES)


def test_imports_are_light_and_start_no_backend():
    subprocess.run([sys.executable, "-m", "tests.data.light_imports"], cwd=ROOT, check=True)
