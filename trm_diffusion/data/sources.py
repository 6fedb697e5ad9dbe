"""One name in the config, one source of records."""

import numpy as np

from trm_diffusion.data.base import DataConfig, Element, Source, check_matches_config, make_element
from trm_diffusion.errors import UserError

__all__ = [
    "CAPTIONED_FILES",
    "CAPTIONED_SOURCES",
    "IMAGE_SOURCES",
    "SOURCES",
    "DataConfig",
    "Element",
    "Source",
    "SyntheticSource",
    "make_source",
]

CAPTIONED_FILES = ("caption_folder", "tfds_captions")  # images with captions from disk
CAPTIONED_SOURCES = ("scenes", "emoji", *CAPTIONED_FILES)
IMAGE_SOURCES = ("image_folder", "image_tars", "tfds")  # labelled images from disk
SOURCES = ("digits", "synthetic", *IMAGE_SOURCES, "latents", *CAPTIONED_SOURCES)

_SYNTHETIC_SEED = 20_231


class SyntheticSource(Source):
    """Standard normal noise that depends on the record's index alone; every class, if there are any, equally often.

    It isolates the loader and the model from storage. Its values are not bounded by [-1, 1].
    """

    def __init__(self, sample_shape: tuple[int, int, int], num_classes: int, num_records: int):
        self.sample_shape = sample_shape
        self.num_classes = num_classes
        self._num_records = num_records

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> Element:
        key = np.array([_SYNTHETIC_SEED, index], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        image = rng.standard_normal(self.sample_shape, np.float32)
        return make_element(image, index % max(1, self.num_classes), index)


def make_source(config: DataConfig) -> Source:
    """Builds the source that `config.source` names and checks it against the rest of the config.

    Raises:
      UserError: an unknown source, data that are missing or unreadable, or data of another image size,
        channel count or class count than the config's.
    """
    _check_config(config)
    size = {"image_size": config.image_size, "channels": config.channels}
    if config.source == "digits":
        from trm_diffusion.data.digits import DigitsSource

        source = DigitsSource(config.split)
    elif config.source == "scenes":
        from trm_diffusion.data.scenes.source import SceneSource

        source = SceneSource(config.image_size, config.split)
    elif config.source == "synthetic":
        shape = (config.image_size, config.image_size, config.channels)
        source = SyntheticSource(shape, config.num_classes, config.synthetic_records)
    elif config.source == "emoji":
        from trm_diffusion.data.emoji import EmojiSource

        source = EmojiSource(config.image_size, config.split)
    elif config.source == "image_folder":
        from trm_diffusion.data.images import ImageFolderSource

        source = ImageFolderSource(config.path, **size)
    elif config.source == "image_tars":
        from trm_diffusion.data.tars import ImageTarSource

        source = ImageTarSource(config.path, num_classes=config.num_classes, **size)
    elif config.source == "caption_folder":
        from trm_diffusion.data.captions import CaptionFolderSource

        source = CaptionFolderSource(config.path, **size)
    elif config.source == "tfds":
        from trm_diffusion.data.images import TfdsSource

        source = TfdsSource(config.tfds_name, config.split, config.path, **size)
    elif config.source == "tfds_captions":
        from trm_diffusion.data.captions import TfdsCaptionSource

        source = TfdsCaptionSource(config.tfds_name, config.split, config.path, **size)
    else:
        from trm_diffusion.data.latents import LatentSource

        if config.flip:
            raise UserError(
                "config.data.flip=true with config.data.source=latents: a flipped latent is not the latent "
                "of the flipped image; set flip=false, and flip=true when --mode=prepare makes the latents"
            )
        source = LatentSource(config.path)
    check_matches_config(source, config)
    return source


def _check_config(config: DataConfig) -> None:
    if config.source not in SOURCES:
        raise UserError(f"config.data.source={config.source!r} is none of {', '.join(SOURCES)}: choose one")
    for field in ("image_size", "channels", "num_classes", "synthetic_records"):
        least = 0 if field == "num_classes" and config.source not in IMAGE_SOURCES else 1
        if getattr(config, field) < least:
            raise UserError(f"config.data.{field}={getattr(config, field)} must be at least {least}")
    if config.workers < 0:
        raise UserError(f"config.data.workers={config.workers} must be 0 (no worker processes) or more")
    if config.source in (*IMAGE_SOURCES, *CAPTIONED_FILES) and config.channels not in (1, 3):
        raise UserError(f"config.data.channels={config.channels}: images have 1 (grey) or 3 (RGB) channels")
