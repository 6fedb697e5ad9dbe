"""Builds an objective by its name in the config."""

import pkgutil

from trm_diffusion.diffusion.objective import OBJECTIVES, DiffusionConfig, Objective


def make_objective(config: DiffusionConfig) -> Objective:
    """The objective that `config` names."""
    return pkgutil.resolve_name(OBJECTIVES[config.objective])(config)
