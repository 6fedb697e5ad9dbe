"""The record of images holds every config field that their pixels depend on, new ones included."""

import copy
import functools

import numpy as np
import pytest

from tests.jobs.tiny import tiny_config
from trm_diffusion.config import Config, fields_of
from trm_diffusion.run.protocol import protocol
from trm_diffusion.runtime.parameters import parameters_sha256

# Written out here as well, so that a field is left out of the record in two places on purpose, or in none.
LEFT_OUT = {
    "sample.classes", "sample.per_class", "sample.batch_size", "model.attention", "model.remat",
    "model.recursion.dispatch", "model.recursion.remat", "model.recursion.scan_latent_steps", "diffusion.normal_cdf",
    "model.text.pretrained", "model.text.revision", "model.text.pretrained_dtype", "data.source", "data.text",
    "data.path", "data.tfds_name", "data.split", "data.vae", "data.flip", "data.synthetic_records", "data.workers",
}  # fmt: skip
# Groups whose fields shape the weights or the work, not how given weights draw an image.
OTHER_GROUPS = {"name", "seed", "train", "optim", "init", "checkpoint", "log", "evaluate", "mesh"}


def changed(config: Config, path: str) -> Config:
    """The config with another value in a field, whatever its type and bounds."""
    group, _, name = path.rpartition(".")
    result = copy.deepcopy(config)
    holder = functools.reduce(getattr, group.split("."), result)
    object.__setattr__(holder, name, "changed")
    return result


def test_the_record_changes_with_every_field_that_changes_pixels():
    config = tiny_config()
    paths = [path.removeprefix("config.") for path, _ in fields_of()]
    leaves = [path for path in paths if not any(other.startswith(path + ".") for other in paths)]
    drawing = [path for path in leaves if path.split(".")[0] not in OTHER_GROUPS]
    assert set(drawing) >= LEFT_OUT and len(drawing) > 60
    record = protocol(config, 3)
    missed = {path for path in drawing if protocol(changed(config, path), 3) == record}
    assert missed == LEFT_OUT


def test_the_names_that_evaluations_share_stay():
    record = protocol(tiny_config(sample__sampler="ddim", sample__eta=0.5, sample__seed=4), 3)
    assert record["eta"] == 0.5 and record["sample_seed"] == 4 and record["guidance_scale"] == 2.0
    assert record["latent_steps"] == 2 and record["parameters"] == "ema 0.9" and record["dtype"] == "float32"
    assert record["config"]["model.recursion.halting"] == "none" and "sample.eta" not in record["config"]


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.ones(3, np.float32), "b": np.full((2, 2), -0.0, np.float32)},
        {"a": np.ones(3, np.float32), "c": np.zeros((2, 2), np.float32)},
        {"a": np.ones(3, np.float32), "b": np.zeros(4, np.float32)},
        {"a": np.ones(3, np.int32), "b": np.zeros((2, 2), np.float32)},
    ],
)
def test_weights_are_hashed_with_names_dtypes_shapes_and_bits(other):
    weights = {"b": np.zeros((2, 2), np.float32), "a": np.ones(3, np.float32)}
    assert parameters_sha256(weights) == parameters_sha256(dict(sorted(weights.items())))
    assert parameters_sha256(weights) != parameters_sha256(other)
