"""Image folders and TFDS: training reads what is on disk, and errors name damage."""

import io
import pickle

import chex
import numpy as np
import pytest
from PIL import Image

from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.images import TfdsSource, centre_crop, to_training_image
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folder_config(path, **changes):
    return DataConfig(**{"source": "image_folder", "path": str(path), "channels": 3, "num_classes": 2} | changes)


@pytest.fixture
def folder(tmp_path):
    """Classes "b" and "a" of 8x8 noise; returns the directory and the pixels in the order of names."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    write_image(tmp_path / "b" / "only.png", pixels[2])
    write_image(tmp_path / "a" / "2.PNG", pixels[1])
    write_image(tmp_path / "a" / "1.png", pixels[0])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path, pixels


def test_image_folder_round_trip(folder):
    path, pixels = folder
    source = make_source(folder_config(path))
    assert source.class_names == ("a", "b") and len(source) == 3
    elements = [pickle.loads(pickle.dumps(source))[i] for i in range(3)]
    assert [int(element["label"]) for element in elements] == [0, 0, 1]
    images = np.stack([element["image"] for element in elements])
    chex.assert_type(images, np.float32)
    assert images.min() >= -1 and images.max() <= 1
    np.testing.assert_array_equal(np.clip(127.5 * images + 128, 0, 255).astype(np.uint8), pixels)


def test_grey_and_palette_images_follow_the_channels():
    image = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1)))
    assert to_training_image(image, 8, 3).shape == (8, 8, 3)
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    grey = to_training_image(palette, 8, 1)
    chex.assert_shape(grey, (8, 8, 1))
    assert (np.diff(grey[0, :, 0]) > 0).all()


def test_halving_by_box_averages_exact_blocks():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    blocks = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3))
    result = np.asarray(centre_crop(Image.fromarray(pixels), 8), np.float32)
    np.testing.assert_allclose(result, blocks, atol=2.0)  # each halving rounds both ways


@pytest.mark.parametrize(("width", "height"), [(100, 40), (23, 61), (5, 3), (16, 16)])
def test_crop_is_the_centre_at_the_size_asked_for(width, height):
    """A dark picture with a bright line through the centre, across its long side."""
    pixels = np.zeros((height, width), np.uint8)
    band = max(1, max(width, height) // 5)
    start = (max(width, height) - band) // 2
    (pixels.T if width >= height else pixels)[start : start + band] = 255
    result = np.asarray(centre_crop(Image.fromarray(pixels), 16), np.float32)
    assert result.shape == (16, 16)
    profile = result.mean(axis=0 if width >= height else 1)
    centre = (profile * np.arange(16)).sum() / profile.sum()
    assert abs(centre - 7.5) < 0.8


def test_an_unreadable_image_is_named(folder):
    path, _ = folder
    (path / "a" / "1.png").write_bytes(b"not a png")
    source = make_source(folder_config(path))
    with pytest.raises(UserError, match=r"a/1\.png"):
        source[0]
    whole = (path / "a" / "2.PNG").read_bytes()
    (path / "a" / "2.PNG").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a/2\.PNG"):
        source[1]


def test_folder_refusals(folder, tmp_path):
    path, _ = folder
    with pytest.raises(UserError, match="config.data.num_classes=2"):
        make_source(folder_config(path, num_classes=3))
    with pytest.raises(UserError, match="is not a directory"):
        make_source(folder_config(path / "missing"))
    with pytest.raises(UserError, match="is not a directory"):
        make_source(folder_config(""))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        make_source(folder_config(tmp_path / "empty"))


def tfds_config(path, **changes):
    fields = {"source": "tfds", "path": str(path), "image_size": 16, "channels": 3, "num_classes": 3}
    return DataConfig(**fields | changes)


@pytest.fixture(scope="module")
def tiny_shapes(tmp_path_factory):
    """A TFDS dataset of 7 flat PNG images, label = i % 3 and value = 20 i, built without TensorFlow."""
    import tensorflow_datasets as tfds

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path_factory.mktemp("package")  # read for metadata files; there are none

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(7):
                file = io.BytesIO()
                Image.fromarray(np.full((10, 12, 3), 20 * i, np.uint8)).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 3}

    data_dir = tmp_path_factory.mktemp("tfds")
    TinyShapes(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_tfds_reads_prepared_records(tiny_shapes):
    source = make_source(tfds_config(tiny_shapes, tfds_name="tiny_shapes"))
    assert len(source) == 7
    copy = pickle.loads(pickle.dumps(source))
    seen = set()
    for index in range(7):
        element = copy[index]
        chex.assert_shape(element["image"], (16, 16, 3))
        chex.assert_trees_all_equal(element, source[index])
        value = round(float((element["image"].mean() + 1) * 127.5))
        assert value // 20 % 3 == element["label"] and np.ptp(element["image"]) == 0
        seen.add(value)
    assert seen == {20 * i for i in range(7)}


def test_tfds_without_tensorflow_through_mock_data(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=4):
        source = TfdsSource("imagenet2012", "train", str(tmp_path), image_size=64, channels=3)
        assert (len(source), source.num_classes) == (4, 1000)
        element = source[3]
    chex.assert_shape(element["image"], (64, 64, 3))
    assert 0 <= element["label"] < 1000 and np.ptp(element["image"]) > 0.1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tfds_name": "imagenet2012", "num_classes": 1000}, "download_and_prepare"),
        ({"tfds_name": "no_such_dataset"}, "knows no dataset 'no_such_dataset'"),
        ({"tfds_name": "tiny_shapes", "split": "validation"}, "it has train"),
        ({"tfds_name": "tiny_shapes", "num_classes": 4}, "config.data.num_classes=3"),
        ({"tfds_name": "ag_news_subset"}, "image and label"),
    ],
)
def test_tfds_refusals_are_one_line(tiny_shapes, changes, says):
    with pytest.raises(UserError) as caught:
        make_source(tfds_config(tiny_shapes, **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)
