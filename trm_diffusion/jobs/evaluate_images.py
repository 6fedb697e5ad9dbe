"""Jobs on image files: evaluating samples with the ADM protocol, and making the reference they are compared with."""

import importlib.metadata
import json

import jax
import numpy as np
from etils import epath

import trm_diffusion
from trm_diffusion.errors import UserError
from trm_diffusion.files import check_writable, replacing, write_json
from trm_diffusion.metrics.adm import (
    PROTOCOL,
    adm_metrics,
    concatenated,
    features_of,
    read_reference,
    reference_arrays,
    warnings_about,
)
from trm_diffusion.metrics.image_sets import ImageSet, open_images
from trm_diffusion.metrics.precision_recall import NEIGHBOURS
from trm_diffusion.readers.paths import any_path
from trm_diffusion.readers.records import read_json
from trm_diffusion.run.protocol import git_commit
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import in_process_0, is_main_process
from trm_diffusion.weights.inception import load_inception

BATCH_SIZE = 64
# Settings that metrics depend on and images do not show; null if there is no record beside the images.
SAMPLING_FIELDS = (
    "sampler",
    "diffusion_steps",
    "eta",
    "guidance_scale",
    "guidance_interval",
    "guidance_channels",
    "latent_steps",
    "label_rule",
    "sample_seed",
    "parameters",
    "update",
    "dtype",
    "vae",
)


def evaluate_images(
    images: str, reference: str, inception: str, out: str = "", image_size: int = 0, precision_dtype: str = "float32"
) -> dict:
    """Evaluates a folder or npz of samples; prints and writes one JSON object with all metrics and their settings.

    Args:
      images: folder of pictures or .npz; `sampling.json` beside them records how they were drawn.
      reference: reference .npz in ADM's layout.
      inception: weights of the FID Inception network.
      out: the JSON file to write; evaluation.json beside the images by default.
      image_size: crop pictures to this size first; 0 keeps them as they are.
      precision_dtype: dtype of the pairwise feature distances in precision and recall, float32 or float16.

    Raises UserError for files that cannot be read or measured.
    """
    samples = open_images(images, image_size)
    target = read_reference(reference)
    weights, weights_sha256 = load_inception(inception)
    path = any_path(out, "--out") if out else beside(samples, "evaluation.json")
    in_process_0(lambda: check_writable(path))
    warnings = warnings_about(samples)
    for warning in warnings:
        say(f"warning: {warning}")

    for images_of in (samples, target.images):
        if len(images_of) <= NEIGHBOURS:
            raise UserError(
                f"{images_of.path} holds {len(images_of)} images; precision and recall need {NEIGHBOURS + 1}"
            )
    measured = concatenated(features_of(weights, samples, BATCH_SIZE, "samples"))
    reference_pool = concatenated(features_of(weights, target.images, BATCH_SIZE, "reference")).pool
    try:
        figures = adm_metrics(measured, target, reference_pool, precision_dtype)
    except ValueError as error:  # features that are non-finite or too large for float16
        raise UserError(f"{images} cannot be measured: {error}") from error
    report = {
        **figures,
        "warnings": warnings,
        "images": str(samples.path),
        "protocol": {
            **PROTOCOL,
            "precision_recall_dtype": precision_dtype,
            "image_size_cropped_to": image_size or None,
            "inception_sha256": weights_sha256,
            "reference": str(target.images.path),
            "reference_sha256": target.sha256,
            "reference_images": len(target.images),
        },
        "sampling": sampling_record(samples),
        "measured_by": {
            "version": trm_diffusion.__version__,
            "git_commit": git_commit(),
            "jax": importlib.metadata.version("jax"),
            "device": jax.devices()[0].device_kind,
        },
    }
    if is_main_process():
        print(json.dumps(report), flush=True)
        write_json(path, report)
        say(f"wrote {path}")
    return report


def make_reference(images: str, inception: str, out: str, image_size: int = 0) -> None:
    """Writes a reference .npz of all images of a folder or npz; see `metrics.adm`."""
    path = any_path(out, "--out")
    if path.suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz, the format of a reference")
    in_process_0(lambda: check_writable(path))
    source = open_images(images, image_size)
    if len(source) < 2:
        raise UserError(f"--images={images} holds one image; a reference needs at least 2, usually a whole data set")
    weights, _ = load_inception(inception)
    arrays = reference_arrays(weights, source, BATCH_SIZE)
    if not is_main_process():
        return
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    say(f"wrote {path}: statistics of {len(source)} images, {len(arrays['arr_0'])} of them for precision and recall")


def sampling_record(samples: ImageSet) -> dict:
    """How the samples were drawn: `SAMPLING_FIELDS` from sampling.json beside them, None for those it lacks."""
    path = beside(samples, "sampling.json")
    record = read_json(path) if path.exists() else {}
    return {field: None for field in SAMPLING_FIELDS} | record


def beside(samples: ImageSet, name: str) -> epath.Path:
    """The path of a file about the samples: in their folder, or next to their npz and prefixed with its name."""
    if samples.path.is_dir():
        return samples.path / name
    return samples.path.with_name(f"{samples.path.stem}.{name}")
