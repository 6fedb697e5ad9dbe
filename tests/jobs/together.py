"""Runs every job once in its own directory, as a single process or as one of several; see test_processes.py.

python -m tests.jobs.together DIRECTORY INPUTS INDEX COUNT PORT
"""

import sys
from pathlib import Path

import jax
import numpy as np
from etils import epath

from tests.jobs.tiny import tiny_config
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sources import make_source
from trm_diffusion.jobs.evaluate import evaluate
from trm_diffusion.jobs.export_images import export
from trm_diffusion.jobs.prepare_latents import prepare
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.metrics import adm
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.models.inception import Features
from trm_diffusion.runtime.processes import barrier, join
from trm_diffusion.runtime.sharding import BATCH_AXES, MeshConfig, batch_sharding, make_mesh, own_rows
from trm_diffusion.runtime.signals import StopRequest

EXPORTED, RECORDS = 11, 32
MESHES = {"fsdp": {"mesh__fsdp": 2}, "tensor": {"mesh__tensor": 2}}


def main(directory: Path, inputs: Path, index: int, count: int, port: int) -> None:
    join(f"localhost:{port}", count, index, detect=False, timeout=300)
    barrier("the jobs begin")
    directory, stop = epath.Path(directory), StopRequest()
    prepare(
        latent_config(inputs, data__source="image_folder", data__path=str(inputs / "images")),
        str(directory / "latents"),
        StopRequest(together=False),
        images_per_shard=6,
    )
    barrier("all latents are there")
    for name, mesh in MESHES.items():
        start = str(directory / "fsdp") if name == "tensor" else ""
        fields = dict(data__path=str(directory / "latents"), log__every=1, init__workdir=start)
        config = latent_config(inputs, **fields | mesh)
        train(config, directory / name, stop)
        export(config, directory / name, stop, EXPORTED, str(directory / f"{name}_images.npz"))
    digits = tiny_config(evaluate__kind="digits", evaluate__num_samples=20, train__updates=3, log__every=1)
    train(digits, directory / "data", stop)
    export(digits, directory / "data", stop, EXPORTED, str(directory / "data_images.npz"))
    sample(digits, directory / "data", stop)
    evaluate(digits, directory / "data", stop)

    adm._forward = jax.jit(lambda weights, images: Features(*([images.mean((1, 2)) * weights] * 3)))
    features = adm.features_of(np.ones(1), open_images(str(directory / "data_images.npz")), 2, "features")
    if index == 0:
        np.save(directory / "features.npy", adm.concatenated(features).pool)
    else:
        list(features)
    np.save(directory / f"read_{index}.npy", records_read())


def latent_config(inputs: Path, **overrides):
    """The config of a model of the tiny autoencoder's latents."""
    fields = dict(data__source="latents", data__channels=4, data__vae=str(inputs / "vae"), train__updates=3)
    fields |= dict(sample__classes=(1, 2), sample__batch_size=4, train__batch_size=4)
    return tiny_config(**fields | overrides)


def records_read() -> np.ndarray:
    """Indices [epochs, records] that this process reads in two epochs, with the batch sharded over all devices."""
    config = tiny_config(data__source="synthetic", data__synthetic_records=RECORDS).data
    sharding = batch_sharding(make_mesh(MeshConfig()))
    assert sharding.spec == jax.sharding.PartitionSpec(BATCH_AXES)
    iterator = make_iterator(make_source(config), config, seed=0, batch_size=8, rows=own_rows(sharding, 8))
    read = [next(iterator)["index"] for _ in range(2 * RECORDS // 8)]
    iterator.close()
    return np.reshape(read, (2, -1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
