"""What does each control cost: trained parameters, and forward FLOPs of one image?

    python -m benchmarks.controls [BASE]       BASE is a file of configs/, digits by default

It passes if the base trains nothing and the plain LoRA trains as many parameters as the full row without its gate.
FLOPs count matrix products, two per multiply-add, at inference and without guidance.
"""

import json
import sys

import jax
import jax.numpy as jnp

from configs import controls
from configs.controls import ROWS
from trm_diffusion.analysis.flops import forward_flops
from trm_diffusion.config import Config, resolve
from trm_diffusion.experiment import build
from trm_diffusion.runtime.parameters import count, trainable_names

SAME_PARAMETERS = 0.02  # maximum relative difference between the LoRA's and the full row's


def cost(config: Config) -> dict[str, int]:
    """Total and trained parameters, and forward FLOPs of one image."""
    experiment = build(config)
    data, shapes = config.data, experiment.model.shapes
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    condition = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], experiment.condition.null)
    flops = forward_flops(lambda p, x, t: experiment.network(p)(x, t, condition), shapes, image, time)
    trained = trainable_names(shapes, config.train.trainable)
    return {
        "parameters": count(shapes),
        "trained_parameters": count({name: shapes[name] for name in trained}),
        "forward_flops": flops,
    }


def main() -> int:
    base = sys.argv[1] if len(sys.argv) > 1 else "digits"
    rows = {row: cost(resolve(controls.get_config(f"base={base},row={row}"))) for row in ROWS}
    print(f"{'row':12} {'parameters':>14} {'trained':>12} {'forward FLOPs':>18}")
    for row, costs in rows.items():
        print(f"{row:12} {costs['parameters']:14,} {costs['trained_parameters']:12,} {costs['forward_flops']:18,}")
    trained = {row: costs["trained_parameters"] for row, costs in rows.items()}
    passed = trained["base"] == 0 and abs(trained["lora"] / trained["full"] - 1) < SAME_PARAMETERS
    print(json.dumps({"base": base, "rows": rows, "pass": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
