"""One name in the config, one objective."""

from trm_diffusion.diffusion.ddpm import DDPM
from trm_diffusion.diffusion.objective import DiffusionConfig, Objective
from trm_diffusion.diffusion.rectified_flow import RectifiedFlow


def make_objective(config: DiffusionConfig) -> Objective:
    """The objective that `config` names."""
    return {"ddpm": DDPM, "rectified_flow": RectifiedFlow}[config.objective](config)
