"""Context images from files: one, a folder, an array; and pairs of contexts and targets to train on."""

import numpy as np
import pytest

from trm_diffusion.analysis.grids import save_png
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.contexts import read_contexts
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError

PAIRS = dict(source="image_pairs", image_size=4, channels=1, context_channels=3, num_classes=1)


def flat(level, size=4):
    return np.full((size, size, 3), level, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two pairs: contexts of levels 0 and 255, targets of 255 and 51."""
    for name, context, target in (("b", 255, 51), ("a", 0, 255)):
        save_png(tmp_path / "context" / f"{name}.png", flat(context))
        save_png(tmp_path / "target" / f"{name}.png", flat(target, size=8))
    return tmp_path


def test_pairs_are_read_by_name_in_their_own_channels(folder):
    source = make_source(DataConfig(path=str(folder), **PAIRS))
    assert len(source) == 2 and source.name(0) == "a.png"
    assert source[0]["context"].shape == (4, 4, 3) and source[0]["image"].shape == (4, 4, 1)
    assert [(source[i]["context"].max(), source[i]["image"].max()) for i in range(2)] == [
        (-1, 1),
        (1, pytest.approx(51 / 127.5 - 1)),
    ]


def test_pairs_that_are_none_are_refused_in_one_line(folder, tmp_path):
    save_png(folder / "target" / "c.png", flat(0))
    for path, says in ((folder, "the first is c"), (tmp_path / "context", "needs the folders context and target")):
        with pytest.raises(UserError, match=says) as caught:
            make_source(DataConfig(path=str(path), **PAIRS))
        assert "\n" not in str(caught.value)
    (folder / "target" / "c.png").unlink()
    with pytest.raises(UserError, match="context images have 1"):
        make_source(DataConfig(path=str(folder), **PAIRS | dict(context_channels=4)))


def test_a_file_a_folder_and_an_array(folder):
    one, names = read_contexts(str(folder / "context" / "b.png"), size=4, channels=1)
    assert one.shape == (1, 4, 4, 1) and one.min() == 1 and names == ["b"]
    both, names = read_contexts(str(folder / "context"), size=2, channels=3)
    assert both.shape == (2, 2, 2, 3) and both[0].max() == -1 and names == ["a", "b"]
    given = np.linspace(-1, 1, 3 * 4 * 4 * 5).reshape(3, 4, 4, 5)
    np.save(folder / "given.npy", given)
    array, names = read_contexts(str(folder / "given.npy"), size=4, channels=5)
    np.testing.assert_array_equal(array, given.astype(np.float32))
    assert array.dtype == np.float32 and names[2] == "given 2"


def test_what_cannot_be_read_is_refused_in_one_line(folder):
    np.save(folder / "large.npy", np.full((1, 4, 4, 3), 2.0))
    np.save(folder / "shape.npy", np.zeros((1, 5, 4, 3)))
    (folder / "broken.npy").write_bytes(b"nothing")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "empty").mkdir()
    for name, channels, says in (
        ("nowhere", 3, "no such file"),
        ("empty", 3, "holds no image files"),
        ("broken.png", 3, "cannot read the image"),
        ("broken.npy", 3, "is not a .npy file"),
        ("shape.npy", 3, r"it must be floats or whole numbers \[N, 4, 4, 3\]"),
        ("large.npy", 3, r"outside \[-1, 1\]"),
        ("context", 4, "as .npy"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            read_contexts(str(folder / name), size=4, channels=channels)
        assert "\n" not in str(caught.value) and name in str(caught.value)
