"""How long does docs/imagenet.md take? FLOPs of its programs over a machine's peak, at a stated utilisation.

FLOPs are those of matrix products and convolutions, two for each multiply-add, counted in the programs themselves: the
training step's loss and gradients, the network twice for each diffusion step (guidance), the autoencoder, the metric
network. Nothing is run, so reading and decoding pictures, communication, memory and compilation are in the utilisation
or not at all. Work in float32 at full precision is measured against the machine's float32 peak: that of the CUDA cores
of an H100, and a sixth of the bfloat16 peak of a TPU, which makes such a product of six in bfloat16.

It passes where DiT-XL/2 has the 118.64 G multiply-adds of the DiT paper's table 1, and training the gates and experts
of its middle block alone costs less than training all of it.

    python -m benchmarks.imagenet [--save docs/results/benchmark_imagenet.json]
"""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.measure import report, rounded
from configs import imagenet256
from trm_diffusion.analysis.flops import forward_flops
from trm_diffusion.build import Experiment, build
from trm_diffusion.config import resolve
from trm_diffusion.metrics.adm import FID_50K_IMAGES, POOL_WIDTH, REFERENCE_IMAGES
from trm_diffusion.metrics.inception import inception_features, layer_shapes
from trm_diffusion.models.vae import SD, VAE
from trm_diffusion.runtime.parameters import count
from trm_diffusion.train import loss_and_metrics
from trm_diffusion.weights.inception import INCEPTION, NUM_LOGITS
from trm_diffusion.weights.vae import DIFFUSERS_VAE

TRAINING_IMAGES, PIXELS = 1_281_167, 256
UPDATES = {"400k": 400_000, "7M": 7_000_000}  # DiT's ablations and its published XL/2
PAPER_MULTIPLY_ADDS = 118.64e9  # of DiT-XL/2 for one image (DiT, table 1)


@dataclasses.dataclass(frozen=True)
class Machine:
    chips: int
    bfloat16: float  # peak FLOP/s of a chip, dense
    float32: float
    utilisation: float  # assumed share of the peak


MACHINES = {
    "8xH100": Machine(chips=8, bfloat16=989e12, float32=67e12, utilisation=0.40),
    "v5p-64": Machine(chips=32, bfloat16=459e12, float32=459e12 / 6, utilisation=0.45),  # the name counts cores
}


def experiment(recursion: str, trainable: str = "all") -> Experiment:
    """The page's experiment, for one image at a time; nothing is computed twice to save memory."""
    c = imagenet256.get_config(f"recursion={recursion}")
    c.model.remat = "none"  # what is computed twice to save memory is in the utilisation
    c.train.update(batch_size=1, trainable=trainable)
    c.model.recursion.update(routing_group=1, remat="none")
    return build(resolve(c))


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def image_of(built: Experiment) -> jax.ShapeDtypeStruct:
    data = built.config.data
    return shape(1, data.image_size, data.image_size, data.channels)


def network_flops(built: Experiment) -> int:
    """Of one image through the network once, as samples are drawn."""
    label = shape(1, dtype=jnp.int32)
    return forward_flops(
        lambda parameters, x, t, y: built.model.bind(parameters)(x, t, y),
        built.model.shapes,
        image_of(built),
        shape(1),
        label,
    )


def training_flops(built: Experiment) -> int:
    """Of one image's share of an update: loss and gradients."""

    def gradients(trainable, frozen, images, labels, key):
        def loss(trainable):
            return loss_and_metrics(built, {**trainable, **frozen}, images, labels, key)[0]

        return jax.grad(loss)(trainable)

    state, key = built.abstract_state, jax.eval_shape(lambda: jax.random.key(0))
    return forward_flops(gradients, state.trainable, state.frozen, image_of(built), shape(1, dtype=jnp.int32), key)


def autoencoder_flops() -> tuple[int, int]:
    """Of encoding one picture, and of decoding one."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VAE(SD, rngs=nnx.Rngs(0))))
    cells = PIXELS // SD.factor
    picture, latent = shape(1, PIXELS, PIXELS, SD.image_channels), shape(1, cells, cells, SD.latent_channels)
    return (
        forward_flops(lambda state, x: nnx.merge(graphdef, state).encode(x), state, picture),
        forward_flops(lambda state, z: nnx.merge(graphdef, state).decode(z), state, latent),
    )


def inception_flops() -> int:
    """Of the metric network's features of one picture."""
    weights = {layer: {"kernel": shape(*size), "bias": shape(size[-1])} for layer, size in layer_shapes().items()}
    weights["fc"] = {"kernel": shape(POOL_WIDTH, NUM_LOGITS)}
    return forward_flops(inception_features, weights, shape(1, PIXELS, PIXELS, 3))


def parameters(base: Experiment, recursive: Experiment) -> dict[str, int]:
    """What --mode=convert and the training job say of the networks at their published sizes."""
    autoencoder = dataclasses.asdict(SD) | {"channels": list(SD.channels)}
    return {
        "autoencoder": sum(math.prod(size) for size in DIFFUSERS_VAE.shapes(autoencoder).values()),
        "dit": count(base.model.shapes),
        "gates_and_experts": count(recursive.abstract_state.trainable),
        "inception": sum(math.prod(size) for size in INCEPTION.shapes({}).values()),
    }


def stages(flops: dict[str, int]) -> dict[str, dict[str, float]]:
    """Of each stage of the page, its FLOPs by the precision they are computed in."""
    c = imagenet256.get_config()
    c.model.remat = "none"
    evaluations = 2 * c.sample.diffusion_steps * FID_50K_IMAGES
    decoding = FID_50K_IMAGES * flops["decode"]
    found = {"prepare, mirror images included": {"float32": 2 * TRAINING_IMAGES * flops["encode"]}}
    for name, title in (("base", "train DiT-XL/2 from scratch"), ("recursion", "train the recursion")):
        for length, updates in UPDATES.items():
            work = updates * c.train.batch_size * flops[f"train_{name}"]
            found[f"{title}, {length} updates"] = {"bfloat16": work}
    for name, title in (("base", "the base"), ("recursion", "the recursion")):
        found[f"sample {title}"] = {"bfloat16": evaluations * flops[f"network_{name}"], "float32": decoding}
    found["evaluate one set"] = {"float32": (FID_50K_IMAGES + REFERENCE_IMAGES) * flops["inception"]}
    return found


def hours(work: dict[str, float], machine: Machine) -> float:
    seconds = sum(flops / getattr(machine, precision) for precision, flops in work.items())
    return seconds / (machine.chips * machine.utilisation) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    arguments = parser.parse_args()
    base, recursive = experiment("off"), experiment("middle", trainable="recursion")
    encode, decode = autoencoder_flops()
    flops = {
        "network_base": network_flops(base),
        "network_recursion": network_flops(recursive),
        "train_base": training_flops(base),
        "train_recursion": training_flops(recursive),
        "encode": encode,
        "decode": decode,
        "inception": inception_flops(),
    }
    work = stages(flops)
    over_paper = flops["network_base"] / 2 / PAPER_MULTIPLY_ADDS
    result = {
        "setting": "DiT-XL/2 at 256x256, batches of 256; recursion of its middle block alone, M 2, T 2, rank 128",
        "machines": {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()},
        "parameters": parameters(base, recursive),
        "gigaflops_an_image": {name: value / 1e9 for name, value in flops.items()},
        "exaflops": {stage: sum(of.values()) / 1e18 for stage, of in work.items()},
        "hours": {
            name: {stage: hours(of, machine) for stage, of in work.items()} for name, machine in MACHINES.items()
        },
        "multiply_adds_over_the_paper": over_paper,
        "pass": abs(over_paper - 1) < 0.01 and flops["train_recursion"] < flops["train_base"],
    }
    report("imagenet", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
