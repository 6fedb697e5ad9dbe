"""The scene judge: right on rendered ground truth, robust to noise, and true to the strict and lenient rules."""

import numpy as np
import pytest
import scipy.ndimage

from trm_diffusion.data.scenes.shapes import render
from trm_diffusion.data.scenes.source import Object, Request, SceneSource
from trm_diffusion.errors import UserError
from trm_diffusion.metrics.scenes.detect import Detection, detect
from trm_diffusion.metrics.scenes.proof import prove_judge
from trm_diffusion.metrics.scenes.score import evaluate_scenes, is_lenient, is_strict, strict_chance


def test_the_proof_holds_on_fewer_scenes():
    proof = prove_judge(num_scenes=300, chance_pairs=600)
    assert proof["pass"]
    for size in ("32x32", "64x64"):
        assert set(proof[size]["truth_strict"].values()) == {1.0}
        assert proof[size]["shuffled_disagreements"] == 0 and proof[size]["shuffled_pairs"] == 300 * 18
        # The sweep has two ends: too low a threshold accepts ellipses as circles.
        assert proof[size]["accepted"]["ellipse"]["0.8"] > 0.2


def test_detection_finds_place_and_size():
    for size in (32, 64):
        source = SceneSource(size, "all")
        scenes = [source.scene(i)[0] for i in range(60)]
        for scene, found in zip(scenes, detect(np.stack([source[i]["image"] for i in range(60)])), strict=True):
            drawn = sorted(scene.objects, key=lambda item: (item.x, item.y))
            for a, b in zip(drawn, sorted(found.objects, key=lambda item: (item.x, item.y)), strict=True):
                assert (a.shape, a.color) == (b.shape, b.color)
                np.testing.assert_allclose((a.x, a.y, a.radius), (b.x, b.y, b.radius), atol=0.4 * size / 32)


def test_noise_blanks_and_touching_objects_are_no_objects():
    rng = np.random.default_rng(0)
    for smooth, amplitude in ((0, 0.3), (1.5, 0.2), (5, 0.3)):
        noise = scipy.ndimage.gaussian_filter(rng.standard_normal((40, 32, 32, 3)), (0, smooth, smooth, 0))
        found = detect(2 * amplitude * noise / noise.std())
        assert all(one.unrecognised for one in found)
    assert detect(np.zeros((2, 64, 64, 3))) == [Detection(()), Detection(())]
    touching = render((Object("circle", "red", 8, 16, 6), Object("circle", "red", 19, 16, 6)), 32)
    assert detect(touching[None]) == [Detection((), 1)]
    pale = render((Object("circle", "red", 16, 16, 6),), 32) / 2
    assert detect(pale[None]) == [Detection((), 1)]


RED_CIRCLE, BLUE_SQUARE = Object("circle", "red", 8, 16, 5), Object("square", "blue", 24, 16, 5)
RED_SQUARE, LOW_CIRCLE = Object("square", "red", 24, 16, 5), Object("circle", "red", 8, 24, 5)


@pytest.mark.parametrize(
    ("request_", "objects", "lenient", "strict"),
    [
        (Request("single_object", ("circle",)), (RED_CIRCLE,), True, True),
        (Request("single_object", ("circle",)), (RED_CIRCLE, BLUE_SQUARE), True, False),
        (Request("single_object", ("circle",)), (BLUE_SQUARE,), False, False),
        (Request("single_object", ("circle",)), (), False, False),
        (Request("two_object", ("circle", "square")), (BLUE_SQUARE, RED_CIRCLE), True, True),
        (Request("two_object", ("circle", "square")), (LOW_CIRCLE, RED_CIRCLE, BLUE_SQUARE), True, False),
        (Request("two_object", ("circle", "square")), (RED_CIRCLE, LOW_CIRCLE), False, False),
        (Request("counting", ("circle",), 2), (RED_CIRCLE, LOW_CIRCLE), True, True),
        (Request("counting", ("circle",), 2), (RED_CIRCLE, LOW_CIRCLE, BLUE_SQUARE), True, False),
        (Request("counting", ("circle",), 2), (RED_CIRCLE,), False, False),
        (Request("counting", ("circle",), 2), (RED_CIRCLE, LOW_CIRCLE, RED_CIRCLE), False, False),
        (Request("counting", ("circle",), 2, ("blue",)), (RED_CIRCLE, LOW_CIRCLE), False, False),
        (Request("colors", ("circle",), colors=("red",)), (RED_CIRCLE,), True, True),
        (Request("colors", ("circle",), colors=("blue",)), (RED_CIRCLE,), False, False),
        (Request("colors", ("square",), colors=("blue",)), (RED_SQUARE, BLUE_SQUARE), True, False),
        (Request("position", ("circle", "square"), relation="left"), (BLUE_SQUARE, RED_CIRCLE), True, True),
        (Request("position", ("square", "circle"), relation="left"), (BLUE_SQUARE, RED_CIRCLE), False, False),
        (Request("position", ("circle", "square"), relation="above"), (BLUE_SQUARE, RED_CIRCLE), False, False),
        (Request("position", ("circle", "square"), relation="left"), (RED_CIRCLE,), False, False),
        (Request("color_attr", ("circle", "square"), colors=("red", "blue")), (RED_CIRCLE, BLUE_SQUARE), True, True),
        (Request("color_attr", ("circle", "square"), colors=("blue", "red")), (RED_CIRCLE, BLUE_SQUARE), False, False),
    ],
)
def test_strict_and_lenient(request_, objects, lenient, strict):
    assert is_lenient(request_, Detection(objects)) is lenient
    assert is_strict(request_, Detection(objects)) is strict
    assert is_lenient(request_, Detection(objects, unrecognised=1)) is lenient
    assert not is_strict(request_, Detection(objects, unrecognised=1))


def test_chance_of_four_shapes_is_the_published_one():
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    chances = [strict_chance(task, 4) for task in tasks]
    np.testing.assert_allclose(chances, [1 / 4, 1 / 6, 1 / 12, 1 / 40, 1 / 24, 1 / 540])
    np.testing.assert_allclose(np.mean([strict_chance(task, 8) for task in tasks]), 0.037, atol=5e-4)


def _free_place(image: np.ndarray) -> np.ndarray:
    """A mask [32, 32] of one pixel, far from everything drawn."""
    distance = scipy.ndimage.distance_transform_edt(np.pad(~image.any(axis=-1), 1))[1:-1, 1:-1]
    return np.arange(32 * 32).reshape(32, 32) == distance.argmax()


def test_evaluation_of_true_spoilt_and_empty_images():
    source = SceneSource(32, "seen")
    images = np.stack([source[i]["image"] for i in range(60)])
    result = evaluate_scenes(images, source)
    assert set(result["strict"].values()) == set(result["lenient"].values()) == {1.0}
    assert set(result["strict"]) == {*source.tasks, "overall", "overall_without_single"}
    # A speck in empty space, in every second round of the six tasks: strictly, half of the images are wrong.
    for i in [i for i in range(60) if i // 6 % 2]:
        images[i][scipy.ndimage.binary_dilation(_free_place(images[i]), iterations=1)] = 1
    result = evaluate_scenes(images, source)
    assert set(result["strict"].values()) == {0.5} and set(result["lenient"].values()) == {1.0}
    low, high = result["strict_95"]["overall"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert result["unrecognised_image_rate"] == 0.5 and 0 < result["unrecognised_blob_rate"] < 0.5
    assert result["shuffled_strict"]["overall"] < 0.3
    result = evaluate_scenes(np.zeros_like(images), source)
    assert set(result["strict"].values()) == {0.0} and set(result["empty_image_rate"].values()) == {1.0}

    with pytest.raises(UserError, match="not finite"):
        evaluate_scenes(np.full_like(images, np.nan), source)
    with pytest.raises(UserError, match="16, 16, 3"):
        evaluate_scenes(images[:, ::2, ::2], source)
