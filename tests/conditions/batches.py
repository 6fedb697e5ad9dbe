"""Batches of a config's own data."""

import jax.numpy as jnp

from trm_diffusion.conditions import make_condition


def batch_of(config, size=8):
    source = make_condition(config).source()
    records = [source[index] for index in range(size)]
    return {name: jnp.stack([record[name] for record in records]) for name in records[0] if name != "index"}
