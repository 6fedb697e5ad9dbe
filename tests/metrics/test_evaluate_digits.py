"""The digit evaluation scores real digits as perfect, and detects what is wrong with others."""

import json

import numpy as np
import pytest

from trm_diffusion.data.digits import load_digits_split
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.digits import evaluate_digits
from trm_diffusion.metrics.frechet import frechet_distance, moments


@pytest.fixture(scope="module")
def split():
    return load_digits_split()


@pytest.fixture(scope="module")
def real(split):
    return evaluate_digits(split[2], split[3])


def test_real_test_digits_score_like_the_judge_and_the_floor(real, split):
    assert real["judge_test_accuracy"] >= 0.97
    assert real["class_accuracy"] == real["judge_test_accuracy"]
    np.testing.assert_allclose(real["frechet_pixels64"], real["frechet_pixels64_floor"])
    assert real["nearest_train_median"] == real["real_test_nearest_train_median"]
    assert real["nearer_than_real_q05"] == pytest.approx(0.05, abs=0.01)
    assert real["nearer_than_real_q01"] == pytest.approx(0.01, abs=0.005)
    counts = np.bincount(split[3])
    per_class = np.dot(real["class_accuracy_per_class"], counts) / counts.sum()
    assert per_class == pytest.approx(real["class_accuracy"])
    assert json.loads(json.dumps(real, allow_nan=False)) == real


def test_units_are_pixels_of_0_to_16(split, real):
    train, test = ((split[i].reshape(-1, 64).astype(np.float64) + 1) * 8 for i in (0, 2))
    assert train.max() == 16
    expected = frechet_distance(*moments(test), *moments(train))
    np.testing.assert_allclose(real["frechet_pixels64"], expected, rtol=1e-6)
    nearest = [np.sqrt(((train - row) ** 2).sum(axis=1).min()) for row in test]
    np.testing.assert_allclose(real["nearest_train_median"], np.median(nearest))
    np.testing.assert_allclose(real["nearest_train_q05"], np.quantile(nearest, 0.05))


def test_shuffled_labels_score_chance(split):
    shuffled = np.random.default_rng(0).permutation(split[3])
    assert 0.04 < evaluate_digits(split[2], shuffled)["class_accuracy"] < 0.17


def test_training_images_are_called_memorised(split):
    result = evaluate_digits(split[0], split[1])
    assert result["nearer_than_real_q01"] == result["nearer_than_real_q05"] == 1
    assert result["nearest_train_median"] == 0
    assert abs(result["frechet_pixels64"]) < 1e-6


def test_noise_is_far_from_everything(split, real):
    noise = np.random.default_rng(0).uniform(-1, 1, split[2].shape)
    result = evaluate_digits(noise, split[3])
    assert result["frechet_pixels64"] > 20 * real["frechet_pixels64"]
    assert result["nearest_train_q05"] > real["nearest_train_median"]
    assert result["nearer_than_real_q05"] == 0 and result["class_accuracy"] < 0.3


def test_values_outside_the_range_are_clipped(split, real):
    stretched = np.where(split[2] >= 1, 3, np.where(split[2] <= -1, -3, split[2]))
    assert evaluate_digits(stretched, split[3]) == real


def test_a_class_that_was_not_asked_for_is_none(split):
    keep = split[3] != 4
    per_class = evaluate_digits(split[2][keep], split[3][keep])["class_accuracy_per_class"]
    assert per_class[4] is None and None not in per_class[:4] + per_class[5:]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(split, value):
    images = split[2].copy()
    images[[5, 9], 0, 0, 0] = value
    with pytest.raises(UserError, match="2 of 359 generated digits are not finite .the first is number 5"):
        evaluate_digits(images, split[3])


def test_wrong_arguments_are_refused(split):
    with pytest.raises(ValueError, match="images must be"):
        evaluate_digits(split[2][..., 0], split[3])
    with pytest.raises(ValueError, match="labels must be"):
        evaluate_digits(split[2], split[3] + 1)
    with pytest.raises(ValueError, match="labels must be"):
        evaluate_digits(split[2], split[3][:-1])
