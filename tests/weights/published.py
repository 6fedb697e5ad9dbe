"""Random weights of small models, in published layouts."""

import numpy as np

from trm_diffusion.weights.convert import LAYOUTS
from trm_diffusion.weights.safetensors import TensorSpec, write_safetensors


def random_tensors(layout_name: str, model: dict, dtype=np.float32, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random tensors of a model in a published layout. Those that must be equal are."""
    layout = LAYOUTS[layout_name]
    rng = np.random.default_rng(0)
    shapes = layout.shapes(model)
    tensors = {}
    for rule in layout.rules(model):
        value = (scale * rng.standard_normal(shapes[rule.ours])).astype(dtype)
        tensors |= zip(rule.theirs, rule.form.theirs(value), strict=True)
    constants = layout.constants(model) if layout.written else {}
    tensors |= {name: value.astype(dtype) for name, value in constants.items()}
    return {layout.prefixes[0] + name: tensor for name, tensor in tensors.items()}


def write(path, tensors) -> str:
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items())
    return str(path)
