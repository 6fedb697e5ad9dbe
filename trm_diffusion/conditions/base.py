"""The contract that every kind of condition keeps.

A condition is a pytree of arrays whose leaves are [B, ...]: labels [B], word ids [B, L], or the leaves of a `Text`. The
rest of the package handles it as a pytree and asks its kind for everything else: what the data give, what stands for no
condition in classifier-free guidance, what the network is given, what a user may ask for, and what a run must remember.
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

if TYPE_CHECKING:
    from trm_diffusion.config import Config

# What a condition is read from.
DATA = "data"  # the run's own data: training, evaluation and grids
PROMPTS = "prompts"  # texts of the user's
NOTHING = "nothing"  # shapes alone: programs are compiled without data, so `null` holds placeholders

# What a user may ask a model for.
LABELS, TEXTS = "labels", "texts"

ROWS_SHOWN = 10  # of a grid, where nothing says which labels or prompts


class SampleRequest(NamedTuple):
    """What to draw: `sample.per_class` images of each label or prompt, one after the other."""

    condition: Any  # leaves [N, ...]
    arrays: dict[str, np.ndarray]  # what was asked for, by name, to be kept beside the images
    captions: list[str] | None = None  # [N] texts, where there are any


class Condition(abc.ABC):
    """One kind of condition, for one run.

    Nothing is read before it is needed. Whatever is read is checked against what the run in `workdir`, and the run that
    it starts from, were conditioned on.

    Args:
      config: a `Config` of this kind.
      workdir: the run's directory; None where there is no run, as in tests and benchmarks.
      reads: DATA, PROMPTS or NOTHING.
    """

    name: str  # of the kind, as a judge of its images asks for it (metrics/judges.py)
    draws: str  # what a user may ask for: LABELS, TEXTS, or a word of the kind's own
    instead: str  # what to do about another request, for an error message

    def __init__(self, config: "Config", workdir: epath.Path | None = None, reads: str = DATA):
        self.config, self.workdir, self.reads = config, workdir, reads

    # The config

    @classmethod
    @abc.abstractmethod
    def matches(cls, config: "Config") -> bool:
        """Does the config describe this kind?"""

    @classmethod
    @abc.abstractmethod
    def check_config(cls, config: "Config") -> None:
        """Raises UserError where the config's model or data do not fit this kind."""

    # The data

    def source(self) -> Source:
        """The records of the config in the form that the model reads.

        Raises UserError where the data are missing, or lack what this kind needs.
        """
        return self.wrap(make_source(self.config.data))

    @abc.abstractmethod
    def wrap(self, source: Source) -> Source:
        """The same records, each with the entries of `record_shapes` beside its "image" and "index"."""

    @property
    @abc.abstractmethod
    def record_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What one record holds of this kind, by its name in a batch; without the batch axis."""

    @abc.abstractmethod
    def from_batch(self, batch: dict) -> Any:
        """The condition in a batch of the data; arrays or their shapes."""

    # No condition, for classifier-free guidance

    @property
    @abc.abstractmethod
    def null(self) -> Any:
        """The condition of one image that stands for none; NumPy arrays without the batch axis."""

    def null_like(self, condition: Any) -> Any:
        """`null` for each image of a batch."""
        return jax.tree.map(lambda null, given: jnp.broadcast_to(null, given.shape), self.null, condition)

    def drop(self, condition: Any, dropped_b: jax.Array) -> Any:
        """The condition with `null` in its place where dropped, bool [B]."""
        return jax.tree.map(
            lambda null, given: jnp.where(per_sample(dropped_b, given), null[None], given), self.null, condition
        )

    # The network

    @property
    def input_channels(self) -> int:
        """Channels of the images that the network is given."""
        return self.config.data.channels

    @property
    def sharded_widths(self) -> tuple[int, ...]:
        """The widths that the number of shards of a parameter must divide."""
        return (self.config.model.width,)

    @property
    def model_fields(self) -> dict:
        """What a manifest of weights says of the model besides the fields that all models share."""
        return {}

    def apply(self, network: Callable, noisy: jax.Array, times: jax.Array, condition: Any, **options):
        """network(images [B, H, W, input_channels], times [B], condition, **options), with what the kind adds.

        noisy: [B, H, W, C] of the data's channels; a condition that is an image may be joined to it along them.
        """
        return network(noisy, times, condition, **options)

    # Requests

    @classmethod
    def require(cls, wanted: str, flag: str) -> None:
        """Raises UserError where `flag` asks for LABELS or TEXTS and this kind draws something else."""
        if cls.draws != wanted:
            raise UserError(f"{flag} draws {wanted}; this model draws {cls.draws}: {cls.instead}")

    @abc.abstractmethod
    def encode(self, wanted: Sequence) -> Any:
        """The condition of these labels or texts, as `draws` says; NumPy leaves [N, ...]."""

    @abc.abstractmethod
    def request(self, prompts: Sequence[str] = ()) -> SampleRequest:
        """The prompts; without any, what the config names or a few records of the run's own data.

        Raises UserError for prompts to a model that reads none, or where nothing encodes them.
        """

    # The run's directory

    def check(self, source: Source) -> None:
        """Raises UserError where the run, or the one it starts from, was conditioned otherwise than by `source`."""
        del source

    def keep(self, source: Source) -> None:
        """Writes to the run's directory what must stay the same; process 0 alone writes."""
        del source

    def runs(self) -> list[epath.Path]:
        """The directories of the run and of the one it starts from, as far as there are any."""
        return [epath.Path(run) for run in (self.workdir, self.config.init.workdir) if run]
