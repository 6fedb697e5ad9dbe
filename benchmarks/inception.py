"""Speed of the metric network on a CPU, compared with the same network in PyTorch.

Images of 32 x 32 are resized and go through the whole network in float32, in XLA and in torch-fidelity's port. Every
round runs both, on all cores. The measure is PyTorch's time over ours.

Target: at least 0.6 of PyTorch's throughput. It needs the parity tests' environment.

    .venv-parity/bin/python -m benchmarks.inception [--save docs/results/benchmark_inception.json]
"""

import argparse
import statistics
import tempfile

import jax
import numpy as np
import torch

from benchmarks.measure import interleaved_seconds, median_ratio, report, rounded
from tests.parity.fidelity import import_torch_fidelity
from trm_diffusion.models.inception import fold_batch_norms, inception_features, random_state

BATCH_SIZE = 32
ROUNDS = 9
LEAST_THROUGHPUT_RATIO = 0.6


def programs() -> dict:
    state = random_state(0)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 32, 32, 3), np.uint8)

    weights, images = jax.device_put(fold_batch_norms(state)), jax.device_put(pixels)
    forward = jax.jit(inception_features)

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, file.name)
        network = import_torch_fidelity().FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name
        )
    images_nchw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    def run_torch():
        with torch.inference_mode():
            network(images_nchw)

    return {"xla": lambda: forward(weights, images), "torch": run_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()

    seconds = interleaved_seconds(programs(), ROUNDS)
    ratio = median_ratio(seconds["torch"], seconds["xla"])
    result = {
        "setting": f"{BATCH_SIZE} images of 32 x 32 a batch, float32, {ROUNDS} rounds",
        "images_per_second": {name: BATCH_SIZE / statistics.median(times) for name, times in seconds.items()},
        "throughput_ratio_to_torch": ratio,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "pass": ratio >= LEAST_THROUGHPUT_RATIO,
    }
    report("inception", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
