"""What a model is conditioned on, such as a label or a text: one class for each kind, and the table of kinds.

A new kind is one subclass of `Condition` (conditions/base.py), in its own file, and one entry in `KINDS`.
"""

from etils import epath

from trm_diffusion.conditions.base import DATA, LABELS, NOTHING, PROMPTS, TEXTS, Condition, SampleRequest
from trm_diffusion.conditions.encoded_text import EncodedText
from trm_diffusion.conditions.labels import Labels
from trm_diffusion.conditions.words import Words

__all__ = [
    "DATA",
    "KINDS",
    "LABELS",
    "NOTHING",
    "PROMPTS",
    "TEXTS",
    "Condition",
    "SampleRequest",
    "kind_of",
    "make_condition",
]

# A config gets the first kind that matches it, so list a special case before the general one.
KINDS: tuple[type[Condition], ...] = (
    Labels,
    Words,
    EncodedText,
)


def kind_of(config) -> type[Condition]:
    """The kind of condition that a `Config` describes."""
    return next(kind for kind in KINDS if kind.matches(config))


def make_condition(config, workdir: epath.Path | None = None, reads: str = DATA) -> Condition:
    """The condition of a config and, if given, of its run. Reads no file; see `Condition` for the arguments."""
    return kind_of(config)(config, workdir, reads)
