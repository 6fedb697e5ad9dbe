"""The interface of every kind of condition.

A condition is a pytree of arrays with leaves [B, ...]: labels [B], word ids [B, L], or the leaves of a `Text`. The rest
of the package treats it as an opaque pytree and asks its kind for everything else: how to read it from the data, the
null condition of classifier-free guidance, the network's inputs, how to encode prompts, and what a run must save.
"""

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from trm_diffusion.data.base import Source
from trm_diffusion.data.sources import make_source
from trm_diffusion.diffusion.objective import per_sample
from trm_diffusion.errors import UserError
from trm_diffusion.readers.paths import any_path

if TYPE_CHECKING:
    from trm_diffusion.config import Config

# Where conditions come from.
DATA = "data"  # the run's own data: training, evaluation and grids
PROMPTS = "prompts"  # prompts from the user
NOTHING = "nothing"  # only shapes, to compile programs without data; `null` holds placeholders

# What a user may ask a model to draw.
LABELS, TEXTS, CONTEXTS = "labels", "texts", "images from context images"

ROWS_SHOWN = 10  # rows of a grid when no labels, prompts or contexts are given


class SampleRequest(NamedTuple):
    """What to draw: `sample.per_class` consecutive images for each label, prompt or context."""

    condition: Any  # leaves [N, ...]
    arrays: dict[str, np.ndarray]  # the labels, prompts or other inputs by name, to save with the images
    captions: list[str] | None = None  # N texts, if there are any
    above: np.ndarray | None = None  # [N, H, W, C'], shown above each image in a grid


class Condition(abc.ABC):
    """One kind of condition, for one run.

    Files are read only when they are needed, and checked against what the run in `workdir` and the run it starts from
    were conditioned on.

    Args:
      config: a `Config` of this kind.
      workdir: the run's directory; None without a run, as in tests and benchmarks.
      reads: DATA, PROMPTS or NOTHING.
    """

    name: str  # of the kind, as a judge requests images by it (metrics/judges.py)
    draws: str  # what a user may ask for: LABELS, TEXTS, or the kind's own word
    instead: str  # what to do instead of any other request, for error messages

    def __init__(self, config: "Config", workdir: epath.Path | None = None, reads: str = DATA):
        self.config, self.workdir, self.reads = config, workdir, reads

    # The config

    @classmethod
    @abc.abstractmethod
    def matches(cls, config: "Config") -> bool:
        """Whether the config describes this kind."""

    @classmethod
    @abc.abstractmethod
    def check_config(cls, config: "Config") -> None:
        """Raises UserError if the config's model or data do not fit this kind."""

    # The data

    def source(self) -> Source:
        """The records of `config.data` in the form that the model reads.

        Raises UserError if the data are missing, or lack what this kind needs.
        """
        return self.wrap(make_source(self.config.data))

    @abc.abstractmethod
    def wrap(self, source: Source) -> Source:
        """Adds the entries of `record_shapes` to each record, beside its "image" and "index"."""

    @property
    @abc.abstractmethod
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of this kind's entries of a record, by name, without the batch axis."""

    @abc.abstractmethod
    def from_batch(self, batch: dict) -> Any:
        """Extracts the condition from a batch of arrays or of their shapes."""

    # The null condition, for classifier-free guidance

    @property
    @abc.abstractmethod
    def null(self) -> Any:
        """The null condition of one image; NumPy arrays without the batch axis."""

    def null_like(self, condition: Any) -> Any:
        """`null`, broadcast to a batch of conditions."""
        return jax.tree.map(lambda null, given: jnp.broadcast_to(null, given.shape), self.null, condition)

    def drop(self, condition: Any, dropped_b: jax.Array) -> Any:
        """Replaces the condition by `null` where `dropped_b`, bool [B], is True."""
        return jax.tree.map(
            lambda null, given: jnp.where(per_sample(dropped_b, given), null[None], given), self.null, condition
        )

    # The network

    @property
    def input_channels(self) -> int:
        """Channels of the network's input images."""
        return self.config.data.channels

    @property
    def sharded_widths(self) -> tuple[int, ...]:
        """The parameter widths that the number of shards must divide."""
        return (self.config.model.width,)

    @property
    def model_fields(self) -> dict:
        """Fields that a weights manifest stores for this kind's models, beyond those of every model."""
        return {}

    def apply(self, network: Callable, noisy: jax.Array, times: jax.Array, condition: Any, **options):
        """Calls network(images [B, H, W, input_channels], times [B], condition, **options).

        noisy: [B, H, W, C] with the data's channels. A kind whose condition is an image may concatenate it along C.
        """
        return network(noisy, times, condition, **options)

    # Requests

    @classmethod
    def require(cls, wanted: str, flag: str) -> None:
        """Raises UserError if `flag` asks for what this kind does not draw; wanted: LABELS, TEXTS or CONTEXTS."""
        if cls.draws != wanted:
            raise UserError(f"{flag} draws {wanted}; this model draws {cls.draws}: {cls.instead}")

    @abc.abstractmethod
    def encode(self, wanted: Sequence) -> Any:
        """The condition of N labels or texts, whichever `draws` names; NumPy leaves [N, ...]."""

    @abc.abstractmethod
    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        """What to draw for these prompts; without any, what the config names or a few records of the run's own data.

        Raises UserError for prompts to a model that reads none, or if no encoder is available for them.
        """

    def request_context(self, path: str, prompts: Sequence[str] = ()) -> SampleRequest:
        """What to draw from the images of --context, a file or a folder of them; prompts: one for all, or one for each.

        Raises UserError where the kind takes none, or no prompts, or they cannot be read.
        """
        self.require(CONTEXTS, "--context")
        raise NotImplementedError(f"{type(self).__name__} draws {CONTEXTS}")

    def encoding(self) -> dict | None:
        """How texts are encoded, for the record of a set of images; None if this kind draws no texts."""
        return None

    # The run's directory

    def check(self, source: Source) -> None:
        """Raises UserError if `source` conditions differently than the run, or the run it starts from, did."""
        del source

    def keep(self, source: Source) -> None:
        """Saves what must not change to the run's directory; only process 0 writes."""
        del source

    def runs(self) -> list[epath.Path]:
        """The directories of the run and of the run it starts from, if there are any."""
        return [any_path(run) for run in (self.workdir, self.config.init.workdir) if run]
