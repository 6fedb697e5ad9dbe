"""The data configuration, and the contract of every source of training records."""

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from trm_diffusion.data.registry import SOURCES
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.readers.opening import read_bytes

if TYPE_CHECKING:
    from trm_diffusion.data.encodings import Encodings

Element = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    source: str = setting("digits", choices=SOURCES)  # where the records come from; data/registry.py
    # directory written by --mode=encode, with encoded text of the data's captions or of prompts
    text: str = setting("", path=True)
    # folders, pairs, tars, latents: the directory; tfds, tfds_captions: data_dir ("" = TFDS's default)
    path: str = setting("", path=True)
    tfds_name: str = "imagenet2012"  # tfds, tfds_captions: the dataset's name, with config and version if needed
    # digits, mazes, frozen_lake: train or test; scenes: train, seen, held_out or all; tfds: any split expression
    split: str = "train"
    image_size: int = setting(8, least=1)  # height and width in pixels or latent cells
    # converted autoencoder for --mode=prepare and to decode sampled latents; "" shows the latents
    vae: str = setting("", path=True)
    channels: int = setting(1, least=1)  # 1 = grey, 3 = RGB; for latents: the VAE's channels
    num_classes: int = setting(10, least=0)  # labels are 0 .. num_classes - 1; 0 for captioned data
    context_channels: int = setting(0, least=0)  # of the image that each image is conditioned on; 0 = none
    flip: bool = False  # random horizontal flips, drawn anew in each epoch
    synthetic_records: int = setting(4096, least=1)  # synthetic: records in one epoch
    workers: int = setting(0, least=0)  # loader worker processes (0 = read in this process, with grain's threads)


class Source(abc.ABC):
    """Random access to records, for grain. Picklable, so that worker processes can have a copy.

    An element is {"image": float32 [H, W, C], in [-1, 1] or scaled latents, "label": int32 scalar,
    "index": int32 scalar, the record's id}; a captioned source has "caption", a string scalar, instead of "label".
    A source of images to be drawn from others has "context" as well, float32 [H, W, context_channels] in [-1, 1].
    Reads must be thread-safe.

    Attributes:
      sample_shape: (H, W, C) of every image.
      num_classes: labels are 0 .. num_classes - 1; 0 if captioned.
      captioned: whether elements have captions instead of labels.
      has_context: whether elements can have a context image; its channels are `context_channels`, 0 if they have none.
      vocabulary: every word of the captions, if they form a closed set; the index of a word must not change.
      spec: what the latents are, if records are latents of images.
      encodings: the encoded texts of the records, if any.
      mirrored: names of the entries of an element that are images, [H, W, ...]; a flip mirrors these.
      stochastic: whether `sample` uses its generator, so that a record differs between epochs.
      in_memory: whether reads are so cheap that more than one read thread would only cost time.
      held_out_split: the `DataConfig.split` of records that no run trains on; "" if the source has none.
      reads_image_files: whether records are image files, cropped to the config's size when read.
    """

    sample_shape: tuple[int, int, int]
    num_classes: int = 0
    captioned: bool = False
    has_context: bool = False
    context_channels: int = 0
    vocabulary: tuple[str, ...] = ()
    spec: LatentSpec | None = None
    encodings: "Encodings | None" = None
    mirrored: tuple[str, ...] = ("image",)
    stochastic: bool = False
    in_memory: bool = False
    held_out_split: str = ""
    reads_image_files: bool = False

    def name(self, index: int) -> str:
        """A name by which a person can find record `index`."""
        return f"record {index}"

    @classmethod
    def focus(cls, context: np.ndarray) -> tuple[int, int]:
        """The pixel (row, column) of a context image [H, W, C'] whose attention is traced; by default the middle."""
        return context.shape[0] // 2, context.shape[1] // 2

    def files(self, index: int) -> list[str]:
        """Paths of the files that hold record `index`; none for records that are computed, or in shards."""
        del index
        return []

    def content(self, index: int) -> bytes:
        """Record `index` as it is stored in `files`, not decoded."""
        return b"".join(read_bytes(file) for file in self.files(index))

    def shard_hashes(self) -> dict[str, str]:
        """Hash of each shard by its file name, as the manifest states it, for records in shards."""
        return {}

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of records in one epoch."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Element:
        """Record `index`; the same on every read."""

    def captions(self, index: int) -> list[str]:
        """Every caption of record `index`. Only for captioned sources."""
        return [str(self[index]["caption"])]

    def sample(self, index: int, rng: np.random.Generator) -> Element:
        """Record `index` as training sees it, with randomness from `rng` if the source is stochastic."""
        del rng
        return self[index]


def make_element(image: np.ndarray, label: int, index: int) -> Element:
    """Builds the element of a record, with the dtypes of the contract."""
    return {
        "image": np.asarray(image, np.float32),
        "label": np.asarray(label, np.int32),
        "index": np.asarray(index, np.int32),
    }


def make_captioned_element(image: np.ndarray, caption: str, index: int) -> Element:
    """Builds the element of a captioned record, with the dtypes of the contract."""
    return {
        "image": np.asarray(image, np.float32),
        "caption": np.asarray(caption, np.str_),
        "index": np.asarray(index, np.int32),
    }


def make_context_element(image: np.ndarray, context: np.ndarray, label: int, index: int) -> Element:
    """Builds the element of a record with a context image, with the dtypes of the contract."""
    return make_element(image, label, index) | {"context": np.asarray(context, np.float32)}


def check_labels(labels, num_classes: int, name: Callable[[int], str]) -> None:
    """Raises UserError for a label that is not one of 0 .. num_classes - 1, or not 0 if there are no classes.

    labels: integers [N]; name(i): of the record with label i, for the error. Everything that reads labels calls this.
    """
    labels = np.asarray(labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= max(1, num_classes)))
    if len(wrong):
        raise UserError(
            f"{name(int(wrong[0]))} has the label {labels[wrong[0]]}; labels go from 0 to {max(1, num_classes) - 1}: "
            "repair the labels, or set config.data.num_classes and config.data.split to those of the data"
        )


def check_matches_config(source: Source, config: DataConfig) -> None:
    """Raises UserError if the data do not match the config."""
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
    if source.context_channels != config.context_channels:
        raise UserError(
            f"config.data.source={config.source} has context images of {source.context_channels} channels, the config "
            f"says {config.context_channels}: set config.data.context_channels={source.context_channels}"
        )
    if len(source) == 0:
        raise UserError(f"config.data.source={config.source} holds no records: check its path and split in config.data")
