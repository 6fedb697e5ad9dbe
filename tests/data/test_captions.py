"""Captioned images from folders, TFDS and OpenMoji: training reads what is on disk, and errors name damage."""

import io
import json
import pickle

import chex
import numpy as np
import pytest
from PIL import Image

from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError


def config(source, path="", **changes):
    fields = {"source": source, "path": str(path), "image_size": 8, "channels": 3, "num_classes": 0}
    return DataConfig(**fields | changes)


@pytest.fixture
def folder(tmp_path):
    """Three flat images of grey 0, 20, 40, without captions."""
    for name, grey in (("a/one.png", 0), ("b.jpg", 20), ("c.png", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((10, 12, 3), grey, np.uint8)).save(tmp_path / name)
    return tmp_path


def test_captions_beside_the_images(folder):
    for name, text in (("a/one.txt", "the one\n\n one again \n"), ("b.txt", "b"), ("c.txt", "c")):
        (folder / name).write_text(text)
    source = pickle.loads(pickle.dumps(make_source(config("caption_folder", folder))))
    assert [str(source[i]["caption"]) for i in range(3)] == ["the one", "b", "c"]
    assert [round(float(source[i]["image"].mean() + 1) * 127.5) for i in range(3)] == [0, 20, 40]
    chex.assert_shape(source[0]["image"], (8, 8, 3))
    # Training draws one of several captions anew in each epoch; the seed determines which.
    batches = []
    for _ in range(2):
        iterator = make_iterator(source, DataConfig(), seed=1, batch_size=30)
        batches.append(next(iterator))
        iterator.close()
    chex.assert_trees_all_equal(*batches)
    captions = batches[0]["caption"][batches[0]["index"] == 0]
    assert len(captions) == 10 and set(captions) == {"the one", "one again"}

    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match="no caption for the image b.jpg"):
        make_source(config("caption_folder", folder))


def test_captions_in_one_file(folder):
    lines = [{"file": "c.png", "caption": "sea"}, {"file": "a/one.png", "captions": ["one", "first"]}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = make_source(config("caption_folder", folder))
    assert [str(source[i]["caption"]) for i in range(len(source))] == ["sea", "one"]
    assert round(float(source[0]["image"].mean() + 1) * 127.5) == 40

    for line, says in (
        ('{"file": "absent.png", "caption": "x"}', "absent.png does not exist"),
        ('{"file": "b.jpg", "caption": " "}', "line 3: no caption"),
        ('{"file": "b.jpg"}', "line 3: caption is missing"),
        ("b.jpg, a picture", "line 3: not JSON"),
    ):
        (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + line)
        with pytest.raises(UserError, match=says):
            make_source(config("caption_folder", folder))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        make_source(config("caption_folder", tmp_path / "absent"))
    with pytest.raises(UserError, match="holds no images with captions"):
        make_source(config("caption_folder", tmp_path))


def test_tfds_captions_are_read_without_the_code_that_made_them(tmp_path):
    """A stand-in for coco_captions, whose own code cannot be imported without TensorFlow."""
    import tensorflow_datasets as tfds

    with pytest.raises(UserError, match="not prepared .* needs TensorFlow"):
        make_source(config("tfds_captions", tmp_path, tfds_name="coco_captions"))

    class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", version="1.0.0")]
        pkg_dir_path = tmp_path  # read for metadata files; there are none

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                file = io.BytesIO()
                Image.fromarray(np.full((10, 12, 3), 20 * i, np.uint8)).save(file, "PNG")
                file.seek(0)
                captions = [{"id": 0, "text": f"grey {20 * i}"}, {"id": 1, "text": f"again {20 * i}"}]
                yield i, {"image": file, "captions": captions}

    CocoCaptions(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = make_source(config("tfds_captions", tmp_path, tfds_name="coco_captions"))
    source = pickle.loads(pickle.dumps(source))
    for index in range(3):
        element = source[index]
        assert str(element["caption"]) == f"grey {round(float(element['image'].mean() + 1) * 127.5)}"
    drawn = {str(source.sample(0, np.random.default_rng(seed))["caption"]).split()[0] for seed in range(8)}
    assert drawn == {"grey", "again"}
    with pytest.raises(
        UserError, match="has the features captions, image: set config.data.tfds_name to one .* class label"
    ):
        make_source(config("tfds", tmp_path, tfds_name="coco_captions", num_classes=3))


def test_emoji_are_named_pictures_on_white():
    source = make_source(config("emoji", image_size=16))
    captions = [str(source[i]["caption"]) for i in range(len(source))]
    assert len(source) > 1800 and {"red apple", "flag of japan", "womans hat", "bicycle"} <= set(captions)
    assert {word for caption in captions for word in caption.split()} == set(source.vocabulary)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    assert images.dtype == np.float32 and images.min() >= -1 and images.max() == 1
    assert (images[:, 0, 0] == 1).all(axis=-1).mean() > 0.95  # the corner is background
    reds = images[captions.index("red heart")].reshape(-1, 3)
    assert (reds[:, 0] - reds[:, 1:].max(axis=1) > 1).sum() > 40
    with pytest.raises(UserError, match="split train only"):
        make_source(config("emoji", split="test"))
