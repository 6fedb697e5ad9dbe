"""Builds the source of records that the config names."""

import pkgutil

from trm_diffusion.data.base import DataConfig, Source, check_matches_config
from trm_diffusion.data.registry import SOURCES


def source_class(name: str) -> type[Source]:
    """The class registered under `name`; its attributes describe the records."""
    return pkgutil.resolve_name(SOURCES[name])


CAPTIONED_SOURCES = tuple(name for name in SOURCES if source_class(name).captioned)
CONTEXT_SOURCES = tuple(name for name in SOURCES if source_class(name).has_context)
IMAGE_FILE_SOURCES = tuple(name for name in SOURCES if source_class(name).reads_image_files)


def make_source(config: DataConfig) -> Source:
    """Builds the source that `config.source` names and checks it against the rest of the config.

    Raises:
      UserError: the data are missing or unreadable, or their image size, channels or classes differ from the config's.
    """
    source = source_class(config.source).from_config(config)
    check_matches_config(source, config)
    return source
