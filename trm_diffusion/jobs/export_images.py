"""The export job: many images of a run as PNG files, which `--mode=evaluate --images` measures.

An image depends on its index, its label and `sample.seed` alone. Every file appears whole or not at all, and a job that
is started again draws the batches of which a file is missing, so a set that was interrupted ends with the same bytes.
Of several processes, each decodes and writes the images that its own devices draw.

NUMBER.png       the images, by index
labels.npy       [N] int32, the classes that were asked for
sampling.json    how they were drawn
"""

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from trm_diffusion.analysis.grids import image_grid, save_png
from trm_diffusion.conditions import LABELS, kind_of
from trm_diffusion.config import Config
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.files import replacing, write_json
from trm_diffusion.jobs.sample import make_sample_fn
from trm_diffusion.metrics.image_sets import FolderImages
from trm_diffusion.run.decoder import load_decoder
from trm_diffusion.run.protocol import evaluation_labels, protocol
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import barrier, is_main_process
from trm_diffusion.runtime.sharding import own_shards
from trm_diffusion.runtime.signals import StopRequest

PLACE = ("version", "git_commit", "jax", "device")  # of the record: where it ran, which may change between two starts


def export(config: Config, workdir: epath.Path, stop: StopRequest, count: int, out: str = "") -> None:
    """Draws `count` images of the run in `workdir`, labels as `evaluate.label_rule` says, sampling as `sample` says.

    Args:
      out: the folder to write; workdir/samples/images_UPDATE by default. FILE.npz is written beside the folder FILE,
        in ADM's layout: arr_0 uint8 [N, H, W, C], arr_1 labels [N].

    Raises:
      UserError: a model of texts, latents without their autoencoder, or a folder that holds images drawn otherwise.
      Interrupted: asked to stop; what was drawn stays.
    """
    kind_of(config).require(LABELS, "--num")
    require_images(config)
    experiment, state = load_run(config, workdir)
    update = int(state.step)
    target = epath.Path(out or workdir / "samples" / f"images_{update:07d}")
    folder = target.with_suffix("") if target.suffix == ".npz" else target
    labels = evaluation_labels(config, count)
    batches = unfinished_batches(folder, count, config.sample.batch_size)
    decoder = load_decoder(experiment, workdir, experiment.mesh.local_mesh)
    start(folder, labels, protocol(config, update, decoder) | {"samples": count})

    draw, parameters = make_sample_fn(experiment, gathered=False), sampling_parameters(experiment, state)
    missing = sum(len(indices) for indices in batches)
    with tqdm.tqdm(total=count, initial=count - missing, unit="image", mininterval=1) as bar:
        for indices in batches:
            if stop.reached():
                raise Interrupted(f"stopped after {bar.n} of {count} images")
            padded = np.resize(indices, config.sample.batch_size)  # one shape, one compilation
            rows, images = own_shards(draw(parameters, labels[padded], padded))
            if decoder is not None and len(rows):
                images = decoder(images)
            for row, image in zip(rows, images, strict=True):
                if row < len(indices):
                    save_png(image_path(folder, indices[row]), image_grid(image[None], columns=1, padding=0))
            bar.update(len(indices))
    barrier("all images are written")
    if target.suffix == ".npz" and is_main_process():
        pack(folder, target, labels)
    say(f"drew {count} images with {config.sample.parameters} parameters: {target}")


def require_images(config: Config) -> None:
    """Raises UserError where samples would be latents that nothing decodes."""
    if config.data.channels not in (1, 3) and not config.data.vae:
        raise UserError(
            f"config.data.channels={config.data.channels}: latents are exported as images, by the autoencoder that "
            "config.data.vae names"
        )


def image_path(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"{index:06d}.png"


def unfinished_batches(folder: epath.Path, count: int, size: int) -> list[np.ndarray]:
    """Indices of each batch of which an image is not there yet, as process 0 sees it."""
    there = {file.name for file in folder.iterdir()} if folder.exists() else set()
    batches = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]
    lacking = as_first_sees([any(image_path(folder, index).name not in there for index in batch) for batch in batches])
    return [batch for batch, lacks in zip(batches, lacking, strict=True) if lacks]


def as_first_sees(flags: Sequence[bool]) -> np.ndarray:
    """What process 0 says, in all of them; so none of them writes before it has looked."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(flags, np.int32))).astype(bool)


def start(folder: epath.Path, labels: np.ndarray, record: dict) -> None:
    """Writes labels and record. Raises UserError where the folder's own record tells of other images."""
    if keep_record(folder / "sampling.json", folder, record) and is_main_process():
        with replacing(folder / "labels.npy") as partial, partial.open("wb") as file:
            np.save(file, labels)
    barrier("the folder is there")


def keep_record(path: epath.Path, folder: epath.Path, record: dict) -> bool:
    """Writes how the images in `folder` are drawn to `path`; False where that tells the same already.

    Raises UserError where it tells of other images.
    """
    if path.exists():
        before, now = ({k: v for k, v in r.items() if k not in PLACE} for r in (json.loads(path.read_text()), record))
        changed = [field for field in now if before.get(field) != now[field]]
        if changed:
            field = changed[0]
            raise UserError(
                f"{folder} holds images drawn with {field} = {before.get(field)!r}, not {now[field]!r}: "
                "remove it, or give another --out"
            )
        return False
    if is_main_process():
        write_json(path, record)
    return True


def pack(folder: epath.Path, target: epath.Path, labels: np.ndarray) -> None:
    """Writes the folder's images and labels as one npz file, a batch at a time, and its record beside it."""
    images = FolderImages(folder)
    first = next(images.batches(1))
    with replacing(target) as partial, partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with _array(archive, "arr_0", (len(images), *first.shape[1:]), np.uint8) as stream:
            for batch in images.batches(256):
                stream.write(np.ascontiguousarray(batch).tobytes())
        with _array(archive, "arr_1", labels.shape, labels.dtype) as stream:
            stream.write(labels.tobytes())
    write_json(target.with_name(f"{folder.name}.sampling.json"), json.loads((folder / "sampling.json").read_text()))


@contextlib.contextmanager
def _array(archive: zipfile.ZipFile, name: str, shape: tuple, dtype) -> Iterator[io.BufferedIOBase]:
    """A stream for the values of an array in an npz file."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    # ZipInfo by name alone has a fixed date, so the same images make the same bytes.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream
