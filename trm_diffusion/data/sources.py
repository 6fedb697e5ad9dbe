"""One name in the config, one source of records."""

import pkgutil

from trm_diffusion.data.base import DataConfig, Source, check_matches_config
from trm_diffusion.data.registry import SOURCES


def source_class(name: str) -> type[Source]:
    """The class behind a name of the registry; its attributes say what such records are."""
    return pkgutil.resolve_name(SOURCES[name])


CAPTIONED_SOURCES = tuple(name for name in SOURCES if source_class(name).captioned)
IMAGE_FILE_SOURCES = tuple(name for name in SOURCES if source_class(name).reads_image_files)


def make_source(config: DataConfig) -> Source:
    """Builds the source that `config.source` names and checks it against the rest of the config.

    Raises:
      UserError: data that are missing or unreadable, or of another image size, channel count or class count than the
        config's.
    """
    source = source_class(config.source).from_config(config)
    check_matches_config(source, config)
    return source
