"""Grids place every image correctly, and files are written atomically."""

import chex
import numpy as np
import pytest
from PIL import Image

from trm_diffusion.analysis.grids import captioned_grid, image_grid, save_png, stacked, to_uint8
from trm_diffusion.errors import UserError


def test_places_scale_and_padding():
    levels = np.array([0, 60, 120, 180, 240])
    images = np.broadcast_to((levels / 127.5 - 1)[:, None, None, None], (5, 2, 3, 1))
    grid = image_grid(images, 3, scale=2, padding=1, background=7)
    chex.assert_shape(grid, (2 * 4 + 3, 3 * 6 + 4, 3))
    chex.assert_type(grid, np.uint8)
    for number, level in enumerate(levels):
        row, column = divmod(number, 3)
        top, left = 1 + row * 5, 1 + column * 7
        assert (grid[top : top + 4, left : left + 6] == level).all()
    assert (grid[6:10, 15:21] == 7).all()  # the empty sixth place
    assert (grid[0] == 7).all() and (grid[:, -1] == 7).all() and (grid[5] == 7).all()


def test_kinds_of_images_are_stacked_in_colour():
    grey, two, four = (np.full((2, size, 3, channels), 0.5) for size, channels in ((1, 1), (2, 2), (3, 4)))
    image = stacked(grey, two, four)
    chex.assert_shape(image, (2, 1 + 1 + 2 + 1 + 3, 3, 3))
    assert (image[:, :1] == 0.5).all() and (image[:, 5:] == 0.5).all()
    assert (image[:, 2:4, :, :2] == 0.5).all() and (image[:, 2:4, :, 2] == -1).all()
    assert not image[:, [1, 4]].any()  # the lines between them


def test_pixels_are_repeated_not_blended():
    image = np.array([[-1.0, 1.0], [1.0, -1.0]])[None, :, :, None]
    grid = image_grid(image, 1, scale=3, padding=0)
    np.testing.assert_array_equal(grid[..., 0], np.kron([[0, 255], [255, 0]], np.ones((3, 3))))


def test_values_are_clipped_and_truncated():
    values = np.array([-9.0, -1.0, -0.5, 0.0, 0.999, 1.0, 9.0])
    grid = image_grid(values.reshape(1, 1, -1, 1), 1, padding=0)
    assert grid[0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_an_error_that_names_it(value):
    images = np.zeros((4, 2, 2, 1))
    images[2, 1, 0, 0] = value
    with pytest.raises(UserError, match="1 of 4 images hold values that are not finite, the first is number 2"):
        image_grid(images, 2)
    with pytest.raises(UserError, match=r"1 of 1 images .* the first is 000002\.png"):
        to_uint8(images[2], "000002.png")
    np.testing.assert_array_equal(to_uint8(images[1]), np.full((2, 2, 3), 128))


def test_every_byte_survives_the_round_trip():
    levels = np.arange(256, dtype=np.float32)
    grid = image_grid((levels / 127.5 - 1).reshape(1, 16, 16, 1), 1, padding=0)
    np.testing.assert_array_equal(grid[..., 1].ravel(), levels)


def test_colours_keep_their_channels():
    image = np.array([1.0, -1.0, 0.0]).reshape(1, 1, 1, 3)
    assert image_grid(image, 1, padding=0)[0, 0].tolist() == [255, 0, 128]


def test_latents_show_three_channels_each_in_its_own_range():
    latents = np.random.default_rng(0).standard_normal((4, 16, 16, 4)) * [1, 100, 0, 1] + [5, 0, 3, 0]
    grid = image_grid(latents, 2, padding=0)
    for channel in (0, 1):
        assert grid[..., channel].min() == 0 and grid[..., channel].max() == 255
        assert 100 < grid[..., channel].mean() < 156
    assert (grid[..., 2] == 128).all()  # a constant channel


@pytest.mark.parametrize(
    ("shape", "columns"), [((4, 4, 1), 1), ((1, 4, 4, 2), 1), ((0, 4, 4, 1), 1), ((1, 4, 4, 1), 0)]
)
def test_bad_arguments_are_refused(shape, columns):
    with pytest.raises(ValueError):
        image_grid(np.zeros(shape), columns)


def test_png_round_trip_and_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    path = tmp_path / "figures" / "grid.png"
    save_png(path, pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)

    def fail_half_way(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(UserError, match="grid.png cannot be written .disk full."):
        save_png(path, 255 - pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_a_png_of_floats_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "grid.png", np.zeros((2, 2, 3)))


def test_captions_are_printed_under_their_images():
    images = np.zeros((3, 8, 8, 3), np.float32)
    grid = captioned_grid(images, ["a red circle", "", "a circle"], 3, scale=10)
    cells = [grid[6:-6, 6 + n * 86 : 86 + n * 86] for n in range(3)]
    for cell in cells:
        np.testing.assert_array_equal(cell[:80], 128)
    ink = [int((cell[80:] < 128).sum()) for cell in cells]
    assert ink[0] > ink[2] > ink[1] == 0
    narrow = captioned_grid(images, ["a red circle", "", "a circle"], 3, scale=5)  # the longest takes 2 or more lines
    assert narrow.shape[0] - 40 > grid.shape[0] - 80
    assert set(np.unique(narrow[:, :6])) == {255}
