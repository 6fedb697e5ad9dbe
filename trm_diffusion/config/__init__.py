"""The configuration of a run: its fields (schema), the way to it from a config file (resolve), and its rules."""

from trm_diffusion.config.resolve import (
    default_config,
    field_exists,
    fields_of,
    resolve,
    to_dict,
    unknown_field,
    variant,
)
from trm_diffusion.config.schema import Config

__all__ = [
    "Config",
    "default_config",
    "field_exists",
    "fields_of",
    "resolve",
    "to_dict",
    "unknown_field",
    "variant",
]
