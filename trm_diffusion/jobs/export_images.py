"""The export job: writes many images of a run as PNG files, for `--mode=evaluate --images`.

An image depends only on its index, its label and `sample.seed`. Files are written atomically, and a restarted job draws
every batch that lacks a file, so an interrupted export ends with the same bytes. Each process decodes and writes the
images that its own devices draw.

NUMBER.png       the images, by index
labels.npy       [N] int32, the requested classes
sampling.json    how they were drawn
"""

import contextlib
import io
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
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import check_writable, replacing, write_json
from trm_diffusion.jobs.sample import make_sample_fn
from trm_diffusion.metrics.image_sets import FolderImages
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.paths import any_path
from trm_diffusion.readers.records import read_json
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.decoder import load_decoder
from trm_diffusion.run.protocol import evaluation_labels, protocol
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import barrier, in_process_0, is_main_process
from trm_diffusion.runtime.sharding import own_shards
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState

# Fields of the record that may differ when an export is resumed: software and device.
FREE = ("version", "git_commit", "jax", "device")


def export(config: Config, workdir: epath.Path, stop: StopRequest, count: int, out: str = "") -> None:
    """Draws `count` images from the run in `workdir`; `evaluate.label_rule` gives the labels, `sample` the settings.

    Args:
      out: the folder to write; workdir/samples/images_UPDATE by default. FILE.npz writes the folder FILE and the .npz
        beside it, in ADM's layout: arr_0 uint8 [N, H, W, C], arr_1 labels [N].

    Raises:
      UserError: a model of texts, latents without an autoencoder, a folder of images drawn with other settings, or one
        in use.
      Interrupted: asked to stop; the images drawn so far are kept.
    """
    kind_of(config).require(LABELS, "--num")
    require_images(config)
    experiment, state = load_run(config, workdir)
    target = any_path(out or workdir / "samples" / f"images_{int(state.step):07d}")
    folder = target.with_suffix("") if target.suffix == ".npz" else target
    if target != folder:
        in_process_0(lambda: check_writable(target))
    with claimed(folder, "--mode=sample --num", stop):
        _export(experiment, state, workdir, stop, count, target, folder)


def _export(
    experiment: Experiment,
    state: TrainState,
    workdir: epath.Path,
    stop: StopRequest,
    count: int,
    target: epath.Path,
    folder: epath.Path,
) -> None:
    """Draws the images that `folder` lacks, and packs them if `target` is an npz."""
    config, update = experiment.config, int(state.step)
    labels = evaluation_labels(config, count)
    batches = unfinished_batches(folder, count, config.sample.batch_size)
    decoder = load_decoder(experiment, workdir, experiment.mesh.local_mesh)
    prepare_folder(folder, labels, protocol(config, update, decoder) | {"samples": count})

    draw = make_sample_fn(experiment, gathered=False)
    parameters = sampling_parameters(experiment, state)
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
    """Raises UserError if samples are latents and the config names no autoencoder to decode them."""
    if config.data.channels not in (1, 3) and not config.data.vae:
        raise UserError(
            f"config.data.channels={config.data.channels}: latents are exported as images; name their autoencoder in "
            "config.data.vae"
        )


def image_path(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"{index:06d}.png"


def unfinished_batches(folder: epath.Path, count: int, size: int) -> list[np.ndarray]:
    """The indices of each batch that lacks an image, as process 0 sees the folder."""
    existing = set(list_files(folder)) if folder.exists() else set()
    batches = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]
    lacking = broadcast_flags(
        [any(image_path(folder, index).name not in existing for index in batch) for batch in batches]
    )
    return [batch for batch, lacks in zip(batches, lacking, strict=True) if lacks]


def broadcast_flags(flags: Sequence[bool]) -> np.ndarray:
    """Broadcasts the flags of process 0 to all processes; none starts to write before process 0 has looked."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(flags, np.int32))).astype(bool)


def prepare_folder(folder: epath.Path, labels: np.ndarray, record: dict) -> None:
    """Writes the labels and the record. Raises UserError if the folder's record has other settings."""
    if keep_record(folder / "sampling.json", folder, record) and is_main_process():
        with replacing(folder / "labels.npy") as partial, partial.open("wb") as file:
            np.save(file, labels)
    barrier("the folder is there")


def keep_record(path: epath.Path, folder: epath.Path, record: dict) -> bool:
    """Writes the record of the images in `folder` to `path`; returns False if it is there already.

    Raises UserError if the record there has other settings.
    """
    if path.exists():
        before = _fixed(read_json(path))
        now = _fixed(record)
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


def _fixed(record: dict) -> dict:
    """The fields that may not differ when an export is resumed."""
    return {field: value for field, value in record.items() if field not in FREE}


def pack(folder: epath.Path, target: epath.Path, labels: np.ndarray) -> None:
    """Writes the folder's images and labels as one npz, a batch at a time, and its record beside it."""
    images = FolderImages(folder)
    first = next(images.batches(1))
    with replacing(target) as partial, partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with _array(archive, "arr_0", (len(images), *first.shape[1:]), np.uint8) as stream:
            for batch in images.batches(256):
                stream.write(np.ascontiguousarray(batch).tobytes())
        with _array(archive, "arr_1", labels.shape, labels.dtype) as stream:
            stream.write(labels.tobytes())
    write_json(target.with_name(f"{folder.name}.sampling.json"), read_json(folder / "sampling.json"))


@contextlib.contextmanager
def _array(archive: zipfile.ZipFile, name: str, shape: tuple, dtype) -> Iterator[io.BufferedIOBase]:
    """Yields a stream for the bytes of one array of an npz file."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    # ZipInfo with only a name has a fixed date, so the same images give the same bytes.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream
