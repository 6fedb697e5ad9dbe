"""A set of images is only continued as it was begun, and only whole images in their own place count."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from trm_diffusion.analysis.grids import mark_of_png, save_png
from trm_diffusion.errors import UserError
from trm_diffusion.run.drawn_set import DrawnSet

RECORD = {"eta": 0.0, "update": 3, "config": {"model.dtype": "float32"}, "vae": None, "jax": "1"}
NAMES = [f"{number}.png" for number in range(5)]


def set_of(folder, **changes) -> DrawnSet:
    folder = epath.Path(folder)
    return DrawnSet(folder, folder / "sampling.json", RECORD | changes)


@pytest.fixture
def folder(tmp_path):
    drawn = set_of(tmp_path / "set")
    drawn.check()
    assert drawn.lacking(NAMES).all()
    drawn.begin()
    for number, name in enumerate(NAMES):
        drawn.save(name, np.full((4, 4, 3), number, np.uint8))
    assert not drawn.lacking(NAMES).any()
    return tmp_path / "set"


def test_another_device_or_version_continues_the_set(folder):
    drawn = set_of(folder, jax="2")
    drawn.check()
    drawn.begin()
    assert not drawn.lacking(NAMES).any() and json.loads((folder / "sampling.json").read_text()) == RECORD


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(eta=0.5), "drawn with eta = 0.0, not 0.5"),
        (dict(config={"model.dtype": "bfloat16"}), "drawn with config.model.dtype = 'float32', not 'bfloat16'"),
        (dict(vae={"id": "sha256:1"}), "lacks vae.id"),
        (dict(weights_sha256="1"), "record sampling.json lacks weights_sha256 .'1' now."),
    ],
)
def test_other_settings_are_refused_by_the_field(folder, changes, says):
    with pytest.raises(UserError, match=says):
        set_of(folder, **changes).check()
    assert set_of(folder, **changes).lacking(NAMES).all()  # and no image would count


def test_a_field_that_is_gone_is_refused(folder):
    drawn = DrawnSet(epath.Path(folder), epath.Path(folder) / "sampling.json", {"update": 3, "vae": None})
    with pytest.raises(UserError, match="drawn with (eta = 0.0|config.model.dtype = 'float32'), which this job lacks"):
        drawn.check()


@pytest.mark.parametrize("content", ["", '{"eta": 0.0', "[1]", "\x00" * 20, '"text"'])
def test_a_damaged_record_is_one_line(folder, content):
    (folder / "sampling.json").write_text(content)
    with pytest.raises(UserError, match=r"sampling\.json is damaged, so it is unknown how .* was drawn") as caught:
        set_of(folder).check()
    assert "\n" not in str(caught.value)


def test_a_set_without_its_record_is_refused(folder):
    (folder / "sampling.json").unlink()
    with pytest.raises(UserError, match=r"is not empty and has no sampling\.json in it: give another --out"):
        set_of(folder).check()


def test_the_partial_files_of_a_killed_job_are_no_set(tmp_path):
    (tmp_path / ".0.png.partial-9").write_bytes(b"torn")
    set_of(tmp_path).check()


def resaved(path):
    with Image.open(path) as image:
        image.load()
    image.save(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes((path.parent / "1.png").read_bytes()),
        lambda path: Image.new("RGB", (4, 4)).save(path),
        resaved,
        lambda path: path.unlink(),
    ],
)
def test_an_image_that_is_damaged_or_another_is_lacking(folder, capsys, damage):
    existed = damage(folder / "3.png") != "" and (folder / "3.png").exists()
    assert set_of(folder).lacking(NAMES).tolist() == [False, False, False, True, False]
    said = "1 images in" in (printed := capsys.readouterr().err) and "the first is 3.png" in printed
    assert said == existed


def test_every_flipped_bit_of_an_image_is_noticed(tmp_path):
    path = tmp_path / "image.png"
    save_png(path, np.random.default_rng(0).integers(0, 256, (3, 3, 3), np.uint8), "the mark")
    whole = path.read_bytes()
    assert mark_of_png(path) == "the mark" and len(whole) < 200
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert mark_of_png(path) != "the mark", position
