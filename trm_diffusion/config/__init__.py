"""The configuration of a run: its fields (schema), how a config file becomes one (resolve), and its rules (rules)."""

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
