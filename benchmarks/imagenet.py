"""How long does docs/imagenet.md take? Estimated from FLOPs for two machines, and by the TPU compiler for one of them.

From FLOPs: matrix products and convolutions, two FLOPs per multiply-add, over a machine's peak at a stated utilisation.
They are counted in the programs themselves: the training step's loss and gradients, the network twice per diffusion
step (guidance), the autoencoder, the metric network. Nothing is run, so reading and decoding images, communication,
memory and compilation count only through the utilisation, or not at all. Work in full float32 precision is divided by
the machine's float32 peak: for an H100, that of its CUDA cores; for a TPU, which computes a float32 product as six
bfloat16 products, a sixth of its bfloat16 peak.

By the compiler, if libtpu is installed: training and sampling (512 samples at a time) with configs/imagenet256.py,
compiled for the chips of a v5p-64 like --mode=compile: the compiler's cycles, plus bytes over the published link
speeds, with no overlap. Loading, logging, checkpoints and the autoencoder are not included. Each of the four programs
takes minutes; --flops_only skips them.

It passes if DiT-XL/2 has the 118.64 G multiply-adds of the DiT paper's table 1, training only the gates and experts of
its middle block costs less than training everything, and the compiler predicts less than the chips' peak.

    python -m benchmarks.imagenet [--flops_only] [--save docs/results/benchmark_imagenet.json]
"""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from benchmarks.measure import progress, report, rounded
from configs import imagenet256
from trm_diffusion.analysis.flops import forward_flops
from trm_diffusion.config import resolve
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment, build
from trm_diffusion.jobs.compile_ahead import compiler_report
from trm_diffusion.jobs.train_step import loss_and_metrics
from trm_diffusion.metrics.adm import FID_50K_IMAGES, POOL_WIDTH, REFERENCE_IMAGES
from trm_diffusion.models.inception import NUM_LOGITS, inception_features, layer_shapes
from trm_diffusion.models.vae import SD, VAE
from trm_diffusion.runtime.parameters import count
from trm_diffusion.weights.inception import INCEPTION
from trm_diffusion.weights.vae import DIFFUSERS_VAE

TRAINING_IMAGES, PIXELS = 1_281_167, 256
UPDATES = {"400k": 400_000, "7M": 7_000_000}  # of DiT's ablations, and of its published XL/2
PROGRAMS = {"base": ("off", "all"), "recursion": ("middle", "recursion")}  # recursive blocks, trainable parameters
TRAIN = {"base": "train DiT-XL/2 from scratch", "recursion": "train the recursion"}
SAMPLE = {"base": "sample the base", "recursion": "sample the recursion"}
COMPILED, TOPOLOGY, SAMPLES_AT_A_TIME = "v5p-64", "v5p:2x4x4", 512
PAPER_MULTIPLY_ADDS = 118.64e9  # of DiT-XL/2 for one image (DiT, table 1)


@dataclasses.dataclass(frozen=True)
class Machine:
    chips: int
    bfloat16: float  # peak FLOP/s of a chip, dense
    float32: float
    utilisation: float  # share of the peak
    utilisation_is: str  # source of that figure


MACHINES = {
    "8xH100": Machine(8, 989e12, 67e12, 0.28, "of training, measured on one H100 at 32 images a chip"),
    COMPILED: Machine(32, 459e12, 459e12 / 6, 0.45, "assumed"),  # the name counts cores
}


def config_of(program: str) -> ml_collections.ConfigDict:
    """The page's config for the base or the recursion."""
    recursion, trainable = PROGRAMS[program]
    c = imagenet256.get_config(f"recursion={recursion}")
    c.train.trainable = trainable
    c.sample.update(batch_size=SAMPLES_AT_A_TIME, guidance_channels="dit3")
    return c


def experiment(program: str) -> Experiment:
    """The page's experiment with a batch of one image and no rematerialisation."""
    c = config_of(program)
    c.model.remat = "none"  # recomputation counts through the utilisation
    c.train.batch_size = 1
    c.model.recursion.update(routing_group=1, remat="none")
    return build(resolve(c))


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def image_of(built: Experiment) -> jax.ShapeDtypeStruct:
    data = built.config.data
    return shape(1, data.image_size, data.image_size, data.channels)


def network_flops(built: Experiment) -> int:
    """FLOPs of one forward pass of one image, as in sampling."""
    label = shape(1, dtype=jnp.int32)
    return forward_flops(
        lambda parameters, x, t, y: built.model.bind(parameters)(x, t, y),
        built.model.shapes,
        image_of(built),
        shape(1),
        label,
    )


def training_flops(built: Experiment) -> int:
    """FLOPs of one image in an update: loss and gradients."""

    def gradients(trainable, frozen, images, labels, key):
        def loss(trainable):
            return loss_and_metrics(built, {**trainable, **frozen}, images, labels, key)[0]

        return jax.grad(loss)(trainable)

    state, key = built.abstract_state, jax.eval_shape(lambda: jax.random.key(0))
    return forward_flops(gradients, state.trainable, state.frozen, image_of(built), shape(1, dtype=jnp.int32), key)


def autoencoder_flops() -> tuple[int, int]:
    """FLOPs of encoding one image, and of decoding one."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VAE(SD, rngs=nnx.Rngs(0))))
    cells = PIXELS // SD.factor
    picture, latent = shape(1, PIXELS, PIXELS, SD.image_channels), shape(1, cells, cells, SD.latent_channels)
    return (
        forward_flops(lambda state, x: nnx.merge(graphdef, state).encode(x), state, picture),
        forward_flops(lambda state, z: nnx.merge(graphdef, state).decode(z), state, latent),
    )


def inception_flops() -> int:
    """FLOPs of the metric network's features of one image."""
    weights = {layer: {"kernel": shape(*size), "bias": shape(size[-1])} for layer, size in layer_shapes().items()}
    weights["fc"] = {"kernel": shape(POOL_WIDTH, NUM_LOGITS)}
    return forward_flops(inception_features, weights, shape(1, PIXELS, PIXELS, 3))


def parameters(base: Experiment, recursive: Experiment) -> dict[str, int]:
    """Parameter counts at the published sizes, as --mode=convert and the training job report them."""
    autoencoder = dataclasses.asdict(SD) | {"channels": list(SD.channels)}
    return {
        "autoencoder": sum(math.prod(size) for size in DIFFUSERS_VAE.shapes(autoencoder).values()),
        "dit": count(base.model.shapes),
        "gates_and_experts": count(recursive.abstract_state.trainable),
        "inception": sum(math.prod(size) for size in INCEPTION.shapes({}).values()),
    }


def stages(flops: dict[str, int]) -> dict[str, dict[str, float]]:
    """FLOPs of each stage of the page, by precision: {stage: {dtype: FLOPs}}."""
    c = imagenet256.get_config()
    c.model.remat = "none"
    evaluations = 2 * c.sample.diffusion_steps * FID_50K_IMAGES
    decoding = FID_50K_IMAGES * flops["decode"]
    found = {"prepare, mirror images included": {"float32": 2 * TRAINING_IMAGES * flops["encode"]}}
    for name, title in TRAIN.items():
        for length, updates in UPDATES.items():
            work = updates * c.train.batch_size * flops[f"train_{name}"]
            found[f"{title}, {length} updates"] = {"bfloat16": work}
    for name, title in SAMPLE.items():
        found[title] = {"bfloat16": evaluations * flops[f"network_{name}"], "float32": decoding}
    found["evaluate one set"] = {"float32": (FID_50K_IMAGES + REFERENCE_IMAGES) * flops["inception"]}
    return found


def hours(work: dict[str, float], machine: Machine) -> float:
    seconds = sum(flops / getattr(machine, precision) for precision, flops in work.items())
    return seconds / (machine.chips * machine.utilisation) / 3600


def by_compiler() -> dict:
    """The compiler's estimates of the programs, and hours by stage; {"not_measured": why} without libtpu."""
    programs, stages = {}, {}
    for name in PROGRAMS:
        config = resolve(config_of(name))
        for job in ("train", "sample"):
            try:
                found = compiler_report(config, TOPOLOGY, 1, job, install=False)
            except UserError as error:
                return {"not_measured": str(error)}
            programs[f"{job} {name}"] = {key: found[key] for key in ("mesh", "batch_size", "seconds", "mfu")}
            progress(f"{job} {name}: {programs[f'{job} {name}']}")
            step = found["seconds"]["step"] / 3600
            if job == "train":
                stages |= {f"{TRAIN[name]}, {length} updates": updates * step for length, updates in UPDATES.items()}
            else:
                stages[SAMPLE[name]] = math.ceil(FID_50K_IMAGES / SAMPLES_AT_A_TIME) * step
    return {"topology": TOPOLOGY, "programs": programs, "hours": stages}


def table(by_flops: dict[str, dict[str, float]], compiled: dict) -> str:
    """Hours by stage: one column per machine from FLOPs, and one from the compiler."""
    columns = by_flops | {f"{COMPILED}, compiler": compiled.get("hours", {})}
    lines = [f"{'hours':44}" + "".join(f"{name:>18}" for name in columns)]
    for stage in by_flops[COMPILED]:
        cells = (f"{column[stage]:.3g}" if stage in column else "-" for column in columns.values())
        lines.append(f"{stage:44}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", help="also write the result to this file")
    parser.add_argument("--flops_only", action="store_true", help="skip the TPU compiler, which takes minutes")
    arguments = parser.parse_args()
    base, recursive = experiment("base"), experiment("recursion")
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
    by_flops = {name: {stage: hours(of, machine) for stage, of in work.items()} for name, machine in MACHINES.items()}
    compiled = {"not_measured": "--flops_only"} if arguments.flops_only else by_compiler()
    utilisations = [program["mfu"] for program in compiled.get("programs", {}).values()]
    over_paper = flops["network_base"] / 2 / PAPER_MULTIPLY_ADDS
    result = {
        "setting": "DiT-XL/2 at 256x256, batches of 256; recursion of its middle block alone, M 2, T 2, rank 128",
        "machines": {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()},
        "parameters": parameters(base, recursive),
        "gigaflops_an_image": {name: value / 1e9 for name, value in flops.items()},
        "exaflops": {stage: sum(of.values()) / 1e18 for stage, of in work.items()},
        "hours": by_flops,
        "compiler": compiled,
        "multiply_adds_over_the_paper": over_paper,
        "pass": abs(over_paper - 1) < 0.01
        and flops["train_recursion"] < flops["train_base"]
        and all(0 < utilisation < 1 for utilisation in utilisations),
    }
    print(table(by_flops, compiled))
    report("imagenet", rounded(result), arguments.save)


if __name__ == "__main__":
    main()
