"""A run notices at its resume that the data under the same names are other data, and says which."""

import os

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.data.written import write_latents
from tests.jobs.tiny import tiny_config
from trm_diffusion.data.images import ImageFolderSource
from trm_diffusion.data.latents import LatentSource
from trm_diffusion.data.synthetic import SyntheticSource
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.jobs.train import train
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.run.data_record import check_data, keep_data
from trm_diffusion.runtime.signals import StopRequest

SPEC = LatentSpec(vae_id="test-vae", scale=0.5, shift=0.25, channels=1, size=4)


def write_image(path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        write_image(tmp_path / "images" / f"class{number % 2}" / f"{number}.bmp", number)
    return tmp_path / "images"


def source_of(folder) -> ImageFolderSource:
    return ImageFolderSource(str(folder), image_size=8, channels=3)


def test_image_files(folder, tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    check_data(source_of(folder), workdir)  # nothing is kept yet
    keep_data(source_of(folder), workdir)
    check_data(source_of(folder), workdir)
    assert capsys.readouterr().err == ""
    os.utime(folder / "class0" / "2.bmp", ns=(0, 1))
    check_data(source_of(folder), workdir)
    assert "1 file (class0/2.bmp) of equal size have another modification time" in capsys.readouterr().err
    for number in (1, 3):
        Image.new("RGB", (9, 9)).save(folder / "class1" / f"{number}.bmp")
    says = (
        r"the data have other content for 2 files \(class1/1\.bmp, class1/3\.bmp\) than when .* or remove .*data\.npz"
    )
    with pytest.raises(UserError, match=says):
        check_data(source_of(folder), workdir)
    (folder / "class0" / "0.bmp").rename(folder / "class0" / "new.bmp")
    with pytest.raises(UserError, match="the data have records of other names"):
        check_data(source_of(folder), workdir)
    (folder / "class0" / "new.bmp").unlink()
    with pytest.raises(UserError, match="the data have 5 records, and 6 when the run in"):
        check_data(source_of(folder), workdir)


def test_shards(tmp_path):
    def latents(value: float) -> LatentSource:
        records = [(np.full((4, 4, 1), value * (index == 2)), np.ones((4, 4, 1)), 0) for index in range(4)]
        return LatentSource(str(write_latents(tmp_path / f"{value}", SPEC, 1, records, per_shard=2)))

    keep_data(latents(1), epath.Path(tmp_path))
    check_data(latents(1.0), epath.Path(tmp_path))  # other files, the same content
    with pytest.raises(UserError, match=r"other content for 1 file \(latents-00001\.array_record\)"):
        check_data(latents(2), epath.Path(tmp_path))


def test_data_that_are_computed(tmp_path):
    keep_data(SyntheticSource((4, 4, 1), 2, 8), epath.Path(tmp_path))
    check_data(SyntheticSource((4, 4, 1), 2, 8), epath.Path(tmp_path))
    with pytest.raises(UserError, match="the data have 9 records, and 8 when"):
        check_data(SyntheticSource((4, 4, 1), 2, 9), epath.Path(tmp_path))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:50], lambda data: b"x" * len(data)])
def test_a_damaged_record_is_one_line(folder, tmp_path, damage):
    keep_data(source_of(folder), epath.Path(tmp_path))
    path = tmp_path / "data.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"data\.npz is damaged, so it is unknown what .*: remove it to go on"):
        check_data(source_of(folder), epath.Path(tmp_path))


def test_training_resumes_on_the_same_images_alone(folder, tmp_path):
    config = tiny_config(
        data__source="image_folder", data__path=str(folder), data__channels=3, data__num_classes=2, train__updates=2
    )
    workdir, stop = epath.Path(tmp_path / "run"), StopRequest()
    stop.requested = True
    with pytest.raises(Interrupted):
        train(config, workdir, stop)
    Image.new("RGB", (9, 9)).save(folder / "class0" / "4.bmp")
    with pytest.raises(UserError, match=r"other content for 1 file \(class0/4\.bmp\)"):
        train(config, workdir, StopRequest())
    (workdir / "data.npz").unlink()
    train(config, workdir, StopRequest())
    assert (workdir / "data.npz").exists() and (workdir / "checkpoints" / "2").exists()
