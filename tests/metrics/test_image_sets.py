"""Folders and npz files give all images in order, and errors name what cannot be read."""

import numpy as np
import pytest
from PIL import Image

from trm_diffusion.errors import UserError
from trm_diffusion.metrics.image_sets import open_images

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), np.uint8)


def folder(path, images=IMAGES, names="{:06d}.png"):
    for number, image in enumerate(images):
        file = path / names.format(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return str(path)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def everything(images, size=3):
    batches = list(images.batches(size))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    return np.concatenate(batches)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=IMAGES, arr_1=np.arange(7))
    images = open_images(str(tmp_path / "a.npz"))
    assert len(images) == 7 and images.labels.tolist() == list(range(7))
    np.testing.assert_array_equal(everything(images), IMAGES)
    np.testing.assert_array_equal(images.take(np.array([1, 4, 6])), IMAGES[[1, 4, 6]])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.arange(7) - 1, "must be class numbers, integers from 0, not -1"),
        (np.ones(7), r"is float64 \[7\]; it must be whole numbers \[7\]"),
        (np.array(list("abcdefg")), r"is <U1 \[7\]; it must be whole numbers \[7\]"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(tmp_path, labels, says):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES, arr_1=labels)
    with pytest.raises(UserError, match=f"a.npz: arr_1 {says}"):
        open_images(str(tmp_path / "a.npz"))


def test_folder(tmp_path):
    images = open_images(folder(tmp_path))
    assert len(images) == 7 and images.labels is None
    np.testing.assert_array_equal(everything(images), IMAGES)
    np.testing.assert_array_equal(images.take(np.array([1, 4, 6])), IMAGES[[1, 4, 6]])


def test_grey_images_get_three_equal_channels(tmp_path):
    grey = IMAGES[..., :1]
    for path in (npz(tmp_path / "a.npz", arr_0=grey), folder(tmp_path / "b", grey[..., 0])):
        np.testing.assert_array_equal(everything(open_images(path)), grey.repeat(3, axis=-1))


def test_pictures_are_cropped_when_asked(tmp_path):
    assert everything(open_images(folder(tmp_path), image_size=4)).shape == (7, 4, 4, 3)


def test_images_sorted_by_class_are_noticed(tmp_path):
    by_class = open_images(folder(tmp_path / "folders", names="class{0}/{0}.png"))
    sorted_labels = open_images(npz(tmp_path / "a.npz", arr_0=IMAGES, arr_1=[0, 0, 1, 1, 2, 2, 3]))
    mixed_labels = open_images(npz(tmp_path / "b.npz", arr_0=IMAGES, arr_1=[0, 3, 1, 1, 2, 2, 3]))
    one_class = open_images(npz(tmp_path / "c.npz", arr_0=IMAGES, arr_1=[5] * 7))
    assert by_class.sorted_by_class() and sorted_labels.sorted_by_class()
    assert not mixed_labels.sorted_by_class() and not one_class.sorted_by_class()


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    for path, message in (
        (tmp_path / "nowhere", "neither a folder of images nor an .npz file"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "text.npz", "is not an .npz file"),
        (npz(tmp_path / "other.npz", images=IMAGES), "is not an npz file with images in arr_0"),
        (npz(tmp_path / "float.npz", arr_0=IMAGES / 255), "must be uint8 .N, H, W, 3., it is float64"),
        (npz(tmp_path / "labels.npz", arr_0=IMAGES, arr_1=[1, 2]), "arr_1 is int64 .2.; it must be whole numbers .7."),
    ):
        with pytest.raises(UserError, match=message):
            open_images(str(path))


def test_pictures_of_several_sizes_or_broken_are_refused(tmp_path):
    path = folder(tmp_path)
    Image.fromarray(IMAGES[0, :4]).save(tmp_path / "000003.png")
    with pytest.raises(UserError, match="000003.png is 5x4, others are 5x6: give --image_size"):
        list(open_images(path).batches(7))
    (tmp_path / "000003.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read the image .*000003.png"):
        list(open_images(path).batches(7))
