"""Recursion over latent steps inside an attention layer, the mechanism of "The Thinking Pixel" (arXiv 2604.25299)."""

from trm_diffusion.models.recursion.config import RecursionConfig, recursive_blocks
from trm_diffusion.models.recursion.gate import Conditioning
from trm_diffusion.models.recursion.layer import Recursion
from trm_diffusion.models.recursion.report import RoutingReport

__all__ = ["Conditioning", "Recursion", "RecursionConfig", "RoutingReport", "recursive_blocks"]
