"""The data configuration, and the contract that every source of training records keeps."""

import abc
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from trm_diffusion.data.registry import SOURCES
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.settings import Settings, setting

if TYPE_CHECKING:
    from trm_diffusion.data.encodings import Encodings

Element = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    source: str = setting("digits", choices=SOURCES)  # where the records come from; data/registry.py
    text: str = ""  # encoded text of the data's captions, or of prompts: a directory that --mode=encode has written
    path: str = ""  # folders, tars, latents: the directory; tfds, tfds_captions: the data_dir ("" = TFDS's own default)
    tfds_name: str = "imagenet2012"  # tfds, tfds_captions: the dataset's name, with config and version if need be
    split: str = "train"  # digits: train or test; scenes: train, seen, held_out or all; tfds: any split expression
    image_size: int = setting(8, least=1)  # pixels or latent cells a side
    vae: str = ""  # converted autoencoder, for --mode=prepare and to decode samples of latents; "" shows latents
    channels: int = setting(1, least=1)  # 1 = grey, 3 = RGB, latents: the VAE's
    num_classes: int = setting(10, least=0)  # labels are 0 .. num_classes - 1; 0 where captions take their place
    flip: bool = False  # random horizontal flip, anew in each epoch
    synthetic_records: int = setting(4096, least=1)  # synthetic: records in one epoch
    workers: int = setting(0, least=0)  # loader worker processes (0 = in this process, with grain's read threads)


class Source(abc.ABC):
    """Random access to records, as grain asks for it; picklable, so that worker processes can have a copy.

    An element is {"image": float32 [H, W, C], in [-1, 1] or scaled latents, "label": int32 scalar,
    "index": int32 scalar, the record's id}; a captioned source has "caption", a string scalar, for "label".
    Reading must be safe from several threads at once.

    Attributes:
      sample_shape: (H, W, C) of every image.
      num_classes: labels are 0 .. num_classes - 1; 0 if captioned.
      captioned: whether elements have captions in place of labels.
      vocabulary: every word of the captions, if they keep to a closed set; a word's place must not change.
      spec: what the latents are, where records are latents of images.
      encodings: the encoded texts that records are given, where there are any.
      mirrored: names of the entries of an element that are images, [H, W, ...], which a flip mirrors.
      stochastic: whether `sample` uses its generator, so that a record differs from epoch to epoch.
      in_memory: whether reading is so cheap that more than one read thread would only cost time.
      reads_image_files: whether records are image files, cropped to the config's size as they are read.
    """

    sample_shape: tuple[int, int, int]
    num_classes: int = 0
    captioned: bool = False
    vocabulary: tuple[str, ...] = ()
    spec: LatentSpec | None = None
    encodings: "Encodings | None" = None
    mirrored: tuple[str, ...] = ("image",)
    stochastic: bool = False
    in_memory: bool = False
    reads_image_files: bool = False

    def name(self, index: int) -> str:
        """What a person finds record `index` by."""
        return f"record {index}"

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of records in one epoch."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Element:
        """Record `index`, the same whenever it is read."""

    def captions(self, index: int) -> list[str]:
        """Every caption of record `index`, of a captioned source."""
        return [str(self[index]["caption"])]

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        """Record `index` as training sees it, with the source's own randomness if it is stochastic."""
        del rng
        return self[index]


def make_element(image: np.ndarray, label: int, index: int) -> Element:
    """Bundles one record with the dtypes of the contract."""
    return {
        "image": np.asarray(image, np.float32),
        "label": np.asarray(label, np.int32),
        "index": np.asarray(index, np.int32),
    }


def make_captioned_element(image: np.ndarray, caption: str, index: int) -> Element:
    """Bundles one record of a captioned source with the dtypes of the contract."""
    return {
        "image": np.asarray(image, np.float32),
        "caption": np.asarray(caption, np.str_),
        "index": np.asarray(index, np.int32),
    }


def check_matches_config(source: Source, config: DataConfig) -> None:
    """Raises a UserError if the data are not what the configuration says they are."""
    wanted_shape = (config.image_size, config.image_size, config.channels)
    if source.sample_shape != wanted_shape:
        height, width, channels = source.sample_shape
        raise UserError(
            f"config.data.source={config.source} holds {height}x{width}x{channels} samples, the config says "
            f"{wanted_shape[0]}x{wanted_shape[1]}x{wanted_shape[2]}: "
            f"set config.data.image_size={height} and config.data.channels={channels}"
        )
    if source.num_classes != config.num_classes:
        held = "captions and no classes" if source.captioned else f"{source.num_classes} classes"
        raise UserError(
            f"config.data.source={config.source} has {held}, the config says "
            f"{config.num_classes}: set config.data.num_classes={source.num_classes}"
        )
    if len(source) == 0:
        raise UserError(f"config.data.source={config.source} holds no records: check its path and split in config.data")
