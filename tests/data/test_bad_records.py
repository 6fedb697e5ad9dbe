"""Labels that are no class, and values that are not finite, are named by their record wherever they enter."""

import io
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.written import write_latents
from tests.jobs.tiny import tiny_config
from trm_diffusion.data.base import DataConfig, Source, check_labels, make_element
from trm_diffusion.data.latents import LatentSource, ShardWriter
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.tars import ImageTarSource
from trm_diffusion.errors import UserError
from trm_diffusion.jobs.train import train
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.runtime.signals import StopRequest

SPEC = LatentSpec(vae_id="test-vae", scale=0.5, shift=0.25, channels=1, size=8)
SHAPE = (8, 8, 1)
CLASSES, COUNT, PER_SHARD = 10, 8, 3


def latents_with(directory, monkeypatch, *, record: int, label: int | None = None, nan: bool = False):
    """A directory of latents, one record of which is not as the writer would write it."""
    encode, written = ShardWriter._encode, []

    def spoiling(self, mean, std, correct):
        data = encode(self, mean, std, correct)
        written.append(data)
        if len(written) - 1 == record and label is not None:
            data = np.array(label, "<i4").tobytes() + data[4:]
        return data[:-2] + b"\x00\x7e" if len(written) - 1 == record and nan else data

    monkeypatch.setattr(ShardWriter, "_encode", spoiling)
    values = np.random.default_rng(0).uniform(0.1, 1, (COUNT, 2, *SHAPE))
    records = [(mean, std, index % CLASSES) for index, (mean, std) in enumerate(values)]
    return write_latents(directory, SPEC, CLASSES, records, PER_SHARD)


class Labelled(Source):
    """Two records, the second of which has the given label, as from TFDS or a source of the user's own."""

    sample_shape, num_classes = (2, 2, 1), 3

    def __init__(self, label: int):
        self._labels = (0, label)

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return f"picture {index}"

    def __getitem__(self, index: int):
        return make_element(np.zeros(self.sample_shape), self._labels[index], index)


def first_batch(source: Source, config: DataConfig | None = None):
    iterator = make_iterator(source, config or DataConfig(), seed=0, batch_size=len(source))
    try:
        return next(iterator)
    finally:
        iterator.close()


@pytest.mark.parametrize("label", [-1, 3])
def test_training_reads_no_label_beyond_the_classes(label):
    assert sorted(first_batch(Labelled(2))["label"]) == [0, 2]
    with pytest.raises(UserError, match=f"picture 1 has the label {label}; labels go from 0 to 2: repair the labels"):
        first_batch(Labelled(label))


@pytest.mark.parametrize("label", [-1, CLASSES, 2**31 - 1])
def test_a_label_in_a_shard_is_named_by_file_and_record(tmp_path, monkeypatch, label):
    source = LatentSource(str(latents_with(tmp_path, monkeypatch, record=4, label=label)))
    with pytest.raises(UserError, match=rf"latents-00001\.array_record: record 1 has the label {label}; labels go"):
        first_batch(source)


@pytest.mark.parametrize("label", ["-1", "12", "99999999999"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_label_in_a_tar_is_named_by_its_image(tmp_path, label, alone):
    """A negative label of every image is none of "no labels", for which each tar would be a class."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, text in enumerate([label] if alone else ["3", label]):
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.cls", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=rf"a\.tar/{int(not alone)}\.png has the label {label}; labels go from 0 to 9"):
        ImageTarSource(str(tmp_path), num_classes=10, image_size=8, channels=3)


def test_data_without_classes_have_the_label_0():
    check_labels([0, 0], 0, str)
    with pytest.raises(UserError, match="1 has the label 1; labels go from 0 to 0"):
        check_labels([0, 1], 0, str)


def test_a_batch_names_its_records_that_are_not_finite(tmp_path, monkeypatch):
    source = LatentSource(str(latents_with(tmp_path, monkeypatch, record=7, nan=True)))
    iterator = make_iterator(source, DataConfig(), seed=0, batch_size=COUNT)
    bad = iterator.nonfinite_records(next(iterator))
    iterator.close()
    assert bad == [f"{tmp_path / 'latents-00002.array_record'}: record 1"]


def test_training_names_the_record_that_is_not_finite(tmp_path, monkeypatch, capsys):
    path = latents_with(tmp_path / "latents", monkeypatch, record=2, nan=True)
    config = tiny_config(data__source="latents", data__path=str(path), train__nonfinite_limit=2)
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run", StopRequest())
    record = re.escape(f"{path / 'latents-00000.array_record'}: record 2")
    assert re.search(rf"the last in the data \({record}\)\. .* and repair the data$", str(caught.value))
    assert re.search(rf"update 1: skipped, because the data \({record}\) is not finite", capsys.readouterr().err)
