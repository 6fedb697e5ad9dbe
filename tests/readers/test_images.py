"""Images of every mode are read in one stated way; what cannot be read is named, in bounded memory."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.readers.written import damaged
from trm_diffusion.data.images import centre_crop, read_training_image
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.readers import images
from trm_diffusion.readers.images import UnreadableImage, naming_damage, read_image, to_channels

RAMP = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (40, 1))


def encoded(image, form="PNG", **options) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    stream.seek(0)
    return stream


def mean(image) -> float:
    return float(np.asarray(image).mean())


def test_16_bits_are_scaled_to_8():
    for form, channels in (("PNG", 1), ("PNG", 3), ("TIFF", 3)):
        image = read_image(encoded(Image.fromarray(RAMP), form), channels)
        assert abs(mean(image) - 127.5) < 0.5, form
    assert np.asarray(to_channels(Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), 1)).tolist() == [[0, 1, 255]]
    big_endian = Image.frombytes("I;16B", (3, 1), np.array([0, 257, 65535], ">u2").tobytes())
    assert np.asarray(to_channels(big_endian, 1)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("array", [RAMP / np.float32(65535), RAMP.astype(np.int32)])
def test_without_an_agreed_white_it_is_refused(array):
    with pytest.raises(UnreadableImage, match="image x .*without an agreed white; save it with 8 or 16 bits"):
        read_image(encoded(Image.fromarray(array), "TIFF"), 3, name="x")


def test_transparency_is_laid_on_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 1] = 255  # green where nothing is seen
    clear[0] = (255, 0, 0, 255)
    wanted = np.full((4, 4, 3), 255, np.uint8)
    wanted[0] = (255, 0, 0)
    rgba = Image.fromarray(clear)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 255, 0, 9, 9, 9])
    for image in (encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True), encoded(rgba, "TIFF")):
        np.testing.assert_array_equal(np.asarray(read_image(image, 3)), wanted)
    np.testing.assert_array_equal(
        np.asarray(read_image(encoded(palette, "GIF", transparency=0), 3)), [[[255] * 3, [9] * 3]]
    )
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA")
    assert np.asarray(read_image(encoded(grey), 1)).tolist() == [[7, 255]]
    opaque = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    np.testing.assert_array_equal(np.asarray(read_image(encoded(opaque.convert("RGBA")), 3)), np.asarray(opaque))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_read_as_pillow_converts_them(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).convert(mode)
    for channels, wanted in ((1, "L"), (3, "RGB")):
        found = read_image(encoded(image, "TIFF"), channels)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert(wanted)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(form, orientation):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255  # the upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(read_image(encoded(Image.fromarray(pixels), form, exif=exif), 1)) > 127
    assert found.shape == ((32, 64) if orientation < 5 else (64, 32))
    half = (found.shape[0] // 2, found.shape[1] // 2)
    quarters = found.reshape(2, half[0], 2, half[1]).mean((1, 3)) > 0.5
    lit = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert quarters.sum() == 1 and quarters[lit]


def test_a_thin_image_is_not_enlarged_without_bound():
    thin = Image.fromarray(np.zeros((3000, 2, 3), np.uint8))
    with pytest.raises(UnreadableImage, match="image thin .*1024x1536000 pixels, at most"):
        read_training_image(encoded(thin), 1024, 3, name="thin")
    with pytest.raises(ValueError, match="pixels"):
        centre_crop(thin, 1024)
    assert centre_crop(Image.fromarray(np.zeros((600, 20, 3), np.uint8)), 64).size == (64, 64)


def test_an_image_that_decodes_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    assert read_image(encoded(Image.new("L", (9, 11))), 1).size == (9, 11)
    with pytest.raises(UnreadableImage, match="10x10 pixels, at most 99"):
        read_image(encoded(Image.new("L", (10, 10))), 1)


def test_no_other_format_is_opened():
    for form in ("PPM", "EPS", "ICO", "TGA"):  # EPS would run Ghostscript
        with pytest.raises(UnreadableImage, match="cannot identify"):
            read_image(encoded(Image.new("RGB", (8, 8)), form), 3)


def test_every_error_of_a_decoder_names_the_image():
    for error in (RuntimeError("x"), KeyError("x"), TypeError("x"), OverflowError(), MemoryError(), SyntaxError("x")):
        with pytest.raises(UnreadableImage, match="^cannot read the image a.png .+: repair or remove it$"):
            with naming_damage("a.png"):
                raise error


def test_sets_and_sources_read_alike(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "gray16.png")
    (pixels,) = next(open_images(str(tmp_path)).batches(1))
    training = read_training_image(tmp_path / "gray16.png", 40, 3)
    np.testing.assert_array_equal(pixels, np.round((training + 1) * 127.5))


SMALL = {
    form: encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)), form).getvalue()
    for form in images.FORMATS
}


@pytest.mark.parametrize("form", images.FORMATS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_damaged_image_is_read_or_named(form, data):
    content = data.draw(damaged(SMALL[form]))
    try:
        image = read_image(io.BytesIO(content), 3, name="x")
    except UnreadableImage as error:
        assert str(error).startswith("cannot read the image x (") and "\n" not in str(error)
    else:
        assert image.mode == "RGB"
