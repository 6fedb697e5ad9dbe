"""Recursive sparse reasoning in diffusion latents, in JAX and Flax NNX."""

__version__ = "0.1.0"
