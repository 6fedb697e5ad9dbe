"""Recursion over latent steps inside an attention layer, the mechanism of "The Thinking Pixel" (arXiv 2604.25299).

In reading order: config, layer (the equations), depth (how the latent steps are run), pool, gate, assignment, experts,
dispatch, report, halting, balance; forms, expert_mlp, looped and liveness go beyond it. docs/own_model.md puts it into
a model of your own.
"""

from trm_diffusion.models.recursion.config import RecursionConfig, recursive_blocks
from trm_diffusion.models.recursion.gate import Conditioning
from trm_diffusion.models.recursion.layer import BlockAttention, Recursion, RecursionOutput
from trm_diffusion.models.recursion.report import RoutingReport

__all__ = [
    "BlockAttention",
    "Conditioning",
    "Recursion",
    "RecursionConfig",
    "RecursionOutput",
    "RoutingReport",
    "recursive_blocks",
]
