"""Imports these modules and checks that they are light and start no JAX backend: python -m tests.data.light_imports"""

import importlib
import sys

MODULES = ("data.latents", "data.images", "data.pipeline", "data.sources", "metrics.digits", "analysis.grids")

if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(f"trm_diffusion.{module}")
    heavy = {"sklearn", "tensorflow_datasets", "PIL"} & sys.modules.keys()
    assert not heavy, heavy
    from jax._src import xla_bridge

    assert not xla_bridge._backends
