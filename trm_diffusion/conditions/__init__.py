"""What a model is conditioned on, such as a label or a text: one class for each kind, and the table of kinds.

A new kind is one subclass of `Condition` (conditions/base.py), in its own file, and a line in `KINDS`.
"""

import functools
import pkgutil

from etils import epath

from trm_diffusion.conditions.base import DATA, LABELS, NOTHING, PROMPTS, TEXTS, Condition, SampleRequest

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
    "kinds",
    "make_condition",
]

# A config gets the first kind that matches it, so list a special case before the general one.
KINDS = (
    "trm_diffusion.conditions.context:ContextImage",
    "trm_diffusion.conditions.labels:Labels",
    "trm_diffusion.conditions.words:Words",
    "trm_diffusion.conditions.encoded_text:EncodedText",
)


@functools.cache
def kinds() -> tuple[type[Condition], ...]:
    """The classes of `KINDS`."""
    return tuple(map(pkgutil.resolve_name, KINDS))


def kind_of(config) -> type[Condition]:
    """The kind of condition that a `Config` describes."""
    return next(kind for kind in kinds() if kind.matches(config))


def make_condition(config, workdir: epath.Path | None = None, reads: str = DATA) -> Condition:
    """The condition of a config and, if given, of its run. Reads no file; see `Condition` for the arguments."""
    return kind_of(config)(config, workdir, reads)
