"""The autoencoder of a run: which latents the run was trained on, and how its samples become images.

A run that trains on latents saves their `LatentSpec` in its workdir; resuming and sampling refuse any other spec.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trm_diffusion.config import Config
from trm_diffusion.data.base import Source
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import write_json
from trm_diffusion.models.latent import LatentSpec
from trm_diffusion.models.vae import VAE, decode_tiled
from trm_diffusion.readers.paths import any_path
from trm_diffusion.readers.records import build, read_json
from trm_diffusion.runtime.processes import is_main_process
from trm_diffusion.runtime.sharding import BATCH_AXES, batch_shards, distribute
from trm_diffusion.weights.store import holds_weights, load_vae, load_weights

SPEC_FILE = "latent.json"  # in a workdir
PIXELS_AT_ONCE = 2**19  # pixels that a device encodes or decodes at a time, to bound its memory
WHOLE_CELLS = 128  # cells a side; larger latents are decoded in tiles


def images_at_once(image_size: int) -> int:
    """How many images a device encodes or decodes at a time: 8 for 256 x 256 pixels."""
    return int(np.clip(PIXELS_AT_ONCE // image_size**2, 1, 32))


def sharded_over_batch(vae: VAE, mesh: Mesh, axes, call: Callable[[VAE, jax.Array], jax.Array]) -> Callable:
    """Jits call(vae, batch) with the batch sharded over mesh axes; matmuls have full float32 precision."""
    whole, batch = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(axes))
    graphdef, state = nnx.split(vae)
    state = distribute(state, whole)

    def run(state, x):
        with jax.default_matmul_precision("highest"):
            return call(nnx.merge(graphdef, state), x)

    jitted = jax.jit(run, in_shardings=(whole, batch), out_shardings=whole)
    return lambda x: jitted(state, distribute(x, batch))


class LatentDecoder:
    """Decodes normalised latents [B, H / f, W / f, C] to images [B, H, W, 3] float32, about -1 .. 1."""

    def __init__(self, vae: VAE, spec: LatentSpec, mesh: Mesh):
        self.spec = spec
        self._shards = batch_shards(mesh)
        self._at_once = self._shards * images_at_once(spec.size * vae.config.factor)
        self._decode = sharded_over_batch(
            vae, mesh, BATCH_AXES, lambda vae, z: vae.decode(spec.denormalize(z.astype(jnp.float32)))
        )

    def __call__(self, z_bhwc: jax.Array) -> np.ndarray:
        z_bhwc = np.asarray(z_bhwc)
        size = min(self._at_once, -(-len(z_bhwc) // self._shards) * self._shards)
        images = []
        for first in range(0, len(z_bhwc), size):
            part = z_bhwc[first : first + size]
            padded = np.resize(part, (size, *part.shape[1:]))  # one shape, one compilation
            images.append(decode_tiled(self._decode, padded, tile=WHOLE_CELLS)[: len(part)])
        return np.concatenate(images)

    def record(self) -> dict:
        """How latents became images, for the record of an evaluation."""
        return {"id": self.spec.vae_id, "scale": self.spec.scale, "shift": self.spec.shift}


def load_decoder(experiment: Experiment, workdir: epath.Path, mesh: Mesh | None = None) -> LatentDecoder | None:
    """The decoder that `data.vae` names, or None if it names none; mesh: the experiment's by default.

    Raises UserError if its latents differ from those that the run in `workdir`, or the run it starts from, trained on.
    """
    config = experiment.config
    if not config.data.vae:
        return None
    vae, spec = config_vae(config)
    for run in filter(None, (workdir, config.init.workdir)):
        kept = kept_spec(any_path(run))
        if kept not in (None, spec):
            raise UserError(
                f"config.data.vae {config.data.vae} has latents of {difference(spec, kept)} of the run in {run}; "
                "give the autoencoder that the run was trained with"
            )
    return LatentDecoder(vae, spec, mesh or experiment.mesh)


def config_vae(config: Config) -> tuple[VAE, LatentSpec]:
    """Loads the autoencoder that `data.vae` names. Raises UserError if the config has another number of channels."""
    vae, spec = load_vae(config.data.vae, config.data.image_size)
    if spec.channels != config.data.channels:
        raise UserError(
            f"config.data.channels is {config.data.channels}, but the latents of config.data.vae {config.data.vae} "
            f"have {spec.channels}"
        )
    return vae, spec


def check_latents(config: Config, source: Source, workdir: epath.Path) -> None:
    """Raises UserError if the data's latents differ from those of the run, the run it starts from, or `data.vae`."""
    spec = source.spec
    kept = kept_spec(workdir)
    if kept and spec is None:
        raise UserError(
            f"{workdir} was trained on latents, which config.data.source {config.data.source} does not hold; "
            "use another --workdir"
        )
    if spec is None:
        return
    others = {f"the run in {run}": kept_spec(any_path(run)) for run in (workdir, config.init.workdir) if run}
    if config.data.vae:
        others[f"config.data.vae {config.data.vae}"] = config_vae(config)[1]
    for other, wanted in others.items():
        if wanted not in (None, spec):
            raise UserError(
                f"config.data.path {config.data.path} holds latents of {difference(spec, wanted)} of {other}; "
                "use the same autoencoder throughout"
            )


def keep_spec(source: Source, workdir: epath.Path) -> None:
    """Saves the spec of a run's latents, if it trains on any, to its workdir."""
    if source.spec is not None and is_main_process():
        write_json(workdir / SPEC_FILE, dataclasses.asdict(source.spec))


def kept_spec(workdir: epath.Path) -> LatentSpec | None:
    """The latents that a run, or a directory of weights, was trained on; None for pixels or if not recorded."""
    path = workdir / SPEC_FILE
    if path.exists():
        return build(LatentSpec, read_json(path), str(path))
    fields = load_weights(workdir).record.get("latent") if holds_weights(workdir) else None
    return build(LatentSpec, fields, f"{workdir}: latent of the manifest") if fields else None


def difference(spec: LatentSpec, other: LatentSpec) -> str:
    """The first field in which two specs differ, as "scale 2.0, not the 1.0"."""
    here, there = dataclasses.asdict(spec), dataclasses.asdict(other)
    field = next(name for name in here if here[name] != there[name])
    return f"{field} {here[field]}, not the {there[field]}"
