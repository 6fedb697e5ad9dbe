"""The export job: writes many images of a run as PNG files, for `--mode=evaluate --images`.

An image depends only on its index, its label and `sample.seed`. Files are written atomically, and a restarted job draws
every batch that lacks a sound image, so an interrupted export ends with the same bytes. Each process decodes and writes
the images that its own devices draw.

NUMBER.png       the images, by index
labels.npy       [N] int32, the requested classes
sampling.json    how they were drawn; see run/drawn_set.py
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator

import numpy as np
import tqdm
from etils import epath

from trm_diffusion.analysis.grids import to_uint8
from trm_diffusion.conditions import LABELS, kind_of
from trm_diffusion.config import Config
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.experiment import Experiment
from trm_diffusion.files import check_writable, replacing, sha256_of_arrays, write_bytes, write_json
from trm_diffusion.jobs.sample import make_sample_fn
from trm_diffusion.metrics.image_sets import FolderImages
from trm_diffusion.readers.images import IMAGE_SUFFIXES
from trm_diffusion.readers.paths import any_path
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.decoder import load_decoder
from trm_diffusion.run.drawn_set import DrawnSet, check_record, visible
from trm_diffusion.run.protocol import evaluation_labels, set_record
from trm_diffusion.run.restore import load_run, sampling_parameters
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import barrier, in_process_0, is_main_process
from trm_diffusion.runtime.sharding import own_shards
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.runtime.state import TrainState

LABELS_FILE, RECORD_FILE = "labels.npy", "sampling.json"


def export(config: Config, workdir: epath.Path, stop: StopRequest, count: int, out: str = "") -> None:
    """Draws `count` images from the run in `workdir`; `evaluate.label_rule` gives the labels, `sample` the settings.

    Args:
      out: the folder to write; workdir/samples/images_UPDATE by default. FILE.npz writes the folder FILE and the .npz
        beside it, in ADM's layout: arr_0 uint8 [N, H, W, C], arr_1 labels [N].

    Raises:
      UserError: a model of texts, latents without an autoencoder, a folder of other images or of images drawn with
        other settings, one in use, or an image that is not finite.
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
    decoder = load_decoder(experiment, workdir, experiment.mesh.local_mesh)
    parameters = sampling_parameters(experiment, state)
    contents = {"samples": count, "labels_sha256": sha256_of_arrays([("", labels)])}
    drawn = DrawnSet(folder, folder / RECORD_FILE, set_record(config, update, parameters, decoder) | contents)
    check_contents(drawn, target, count)
    lacking = drawn.lacking([image_name(index) for index in range(count)])
    drawn.begin()
    if is_main_process():
        write_labels(folder / LABELS_FILE, labels)
    barrier("the folder is there")

    draw = make_sample_fn(experiment, gathered=False)
    batches = unfinished_batches(lacking, config.sample.batch_size)
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
                    name = image_name(indices[row])
                    drawn.save(name, to_uint8(image, name))
            bar.update(len(indices))
    barrier("all images are written")
    if target.suffix == ".npz" and is_main_process():
        pack(drawn, target, labels)
    say(f"drew {count} images with {config.sample.parameters} parameters: {target}")


def require_images(config: Config) -> None:
    """Raises UserError if samples are latents and the config names no autoencoder to decode them."""
    if config.data.channels not in (1, 3) and not config.data.vae:
        raise UserError(
            f"config.data.channels={config.data.channels}: latents are exported as images; name their autoencoder in "
            "config.data.vae"
        )


def image_name(index: int) -> str:
    return f"{index:06d}.png"


def record_of_npz(target: epath.Path) -> epath.Path:
    return target.with_suffix(f".{RECORD_FILE}")


def check_contents(drawn: DrawnSet, target: epath.Path, count: int) -> None:
    """Raises UserError if the folder or the .npz to write holds anything that is not part of this export."""
    drawn.check()
    images = {image_name(index) for index in range(count)}
    others = [name for name in visible(drawn.folder) if name.lower().endswith(IMAGE_SUFFIXES) and name not in images]
    if others:
        raise UserError(f"{drawn.folder} holds {len(others)} other images, such as {others[0]}: move them away")
    if target != drawn.folder:
        check_record(record_of_npz(target), target, drawn.record)
        if target.exists() and not record_of_npz(target).exists():
            raise UserError(f"{target} exists and has no {record_of_npz(target).name}: give another --out")


def unfinished_batches(lacking: np.ndarray, size: int) -> list[np.ndarray]:
    """The indices of each batch with an image to draw; lacking: bool [N]."""
    count = len(lacking)
    batches = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]
    return [batch for batch in batches if lacking[batch].any()]


def write_labels(path: epath.Path, labels: np.ndarray) -> None:
    """Writes labels.npy, unless it is there with the same bytes."""
    stream = io.BytesIO()
    np.save(stream, labels)
    wrong = path.exists() and path.read_bytes() != stream.getvalue()
    if wrong:
        say(f"{path} does not hold the labels of these images; it is written again")
    if wrong or not path.exists():
        write_bytes(path, stream.getvalue())


def pack(drawn: DrawnSet, target: epath.Path, labels: np.ndarray) -> None:
    """Writes the images and labels as one npz, a batch at a time, after its record beside it."""
    write_json(record_of_npz(target), drawn.record)
    images = FolderImages(drawn.folder)
    first = next(images.batches(1))
    with replacing(target) as partial, partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with _array(archive, "arr_0", (len(images), *first.shape[1:]), np.uint8) as stream:
            for batch in images.batches(256):
                stream.write(np.ascontiguousarray(batch).tobytes())
        with _array(archive, "arr_1", labels.shape, labels.dtype) as stream:
            stream.write(labels.tobytes())


@contextlib.contextmanager
def _array(archive: zipfile.ZipFile, name: str, shape: tuple, dtype) -> Iterator[io.BufferedIOBase]:
    """Yields a stream for the bytes of one array of an npz file."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    # ZipInfo with only a name has a fixed date, so the same images give the same bytes.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream
