"""Prepared latents: written, read and sampled exactly, and refused if anything is wrong."""

import dataclasses
import hashlib
import json
import pickle

import chex
import numpy as np
import pytest

from tests.data.written import write_latents
from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.latents import ShardWriter, read_shard_record
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError
from trm_diffusion.models.latent import LatentSpec

SPEC = LatentSpec(vae_id="test-vae", scale=0.5, shift=0.25, channels=2, size=4)
SHAPE = (4, 4, 2)
COUNT = 7


def posteriors():
    rng = np.random.default_rng(0)
    means = rng.standard_normal((COUNT, *SHAPE)).astype(np.float16)
    stds = rng.uniform(0.1, 2, (COUNT, *SHAPE)).astype(np.float16)
    return means, stds, np.arange(COUNT) % 3


def prepare(directory):
    return write_latents(directory, SPEC, 3, zip(*posteriors(), strict=True), per_shard=3)


def latent_config(path, **changes):
    fields = {"source": "latents", "path": str(path), "image_size": 4, "channels": 2, "num_classes": 3}
    return DataConfig(**fields | changes)


@pytest.fixture
def prepared(tmp_path):
    return prepare(tmp_path / "latents")


def test_round_trip_over_shards(prepared):
    assert len(list(prepared.glob("*.array_record"))) == 3
    source = make_source(latent_config(prepared))
    assert source.spec == SPEC and len(source) == COUNT
    means, _, labels = posteriors()
    source[0]  # opens a reader before the copy is made
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for index in range(COUNT):
            element = reader[index]
            chex.assert_type(element["image"], np.float32)
            expected = (means[index].astype(np.float32) - SPEC.shift) * SPEC.scale
            np.testing.assert_array_equal(element["image"], expected)
            assert (element["label"], element["index"]) == (labels[index], index)


def test_samples_follow_the_posterior(prepared):
    source = make_source(latent_config(prepared))
    means, stds, _ = posteriors()
    rng = np.random.default_rng(1)
    draws = np.stack([source.sample(5, rng)["image"] for _ in range(4000)])
    chex.assert_type(draws, np.float32)
    np.testing.assert_allclose(draws.mean(0), (means[5] - SPEC.shift) * SPEC.scale, atol=0.08)
    np.testing.assert_allclose(draws.std(0), stds[5] * SPEC.scale, rtol=0.08)


def test_noise_is_new_in_each_epoch_and_the_same_in_each_run(prepared):
    config = latent_config(prepared)

    def epochs(process_count=1):
        parts = []
        for rows in np.split(np.arange(14), process_count):
            iterator = make_iterator(make_source(config), config, seed=3, batch_size=14, rows=rows)
            parts.append(next(iterator))
            iterator.close()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    first = epochs()
    order = [np.flatnonzero(first["index"] == record) for record in range(COUNT)]
    assert all(len(places) == 2 for places in order)
    for early, late in order:
        assert not np.isclose(first["image"][early], first["image"][late]).any()
    chex.assert_trees_all_equal(first, epochs(), epochs(process_count=2))


def test_the_same_records_give_the_same_bytes(tmp_path):
    def digests(directory):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}

    first = digests(prepare(tmp_path / "first"))
    assert len(first) == 7 and first == digests(prepare(tmp_path / "second"))


def test_an_interrupted_writer_leaves_no_manifest_and_can_run_again(tmp_path):
    directory = tmp_path / "latents"
    directory.mkdir()
    with pytest.raises(KeyboardInterrupt), ShardWriter(directory, 0, SPEC, num_classes=3) as writer:
        writer.write(np.zeros(SHAPE), np.ones(SHAPE), 0)
        assert list(directory.iterdir())
        raise KeyboardInterrupt
    assert not list(directory.iterdir())
    with pytest.raises(UserError, match=r"manifest\.json.*--mode=prepare"):
        make_source(latent_config(directory))
    prepare(directory)
    assert len(make_source(latent_config(directory))) == COUNT


def test_writer_refusals(tmp_path):
    with ShardWriter(tmp_path, 0, SPEC, num_classes=3) as writer:
        with pytest.raises(
            UserError, match="latents-00000.array_record, record 0 has the label 3; labels go from 0 to 2"
        ):
            writer.write(np.zeros(SHAPE), np.ones(SHAPE), 3)
        with pytest.raises(UserError, match="mean has shape"):
            writer.write(np.zeros((2, 4, 4)), np.ones(SHAPE), 0)
        with pytest.raises(UserError, match="std holds values that are not finite"):
            writer.write(np.zeros(SHAPE), np.full(SHAPE, 1e6), 0)
        writer.write(np.zeros(SHAPE), np.ones(SHAPE), 0)
    assert writer.records == read_shard_record(tmp_path, 0)["records"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": ""}, "--config.data.source=synthetic"),
        ({"path": "/no/such/place"}, "--mode=prepare"),
        ({"image_size": 8}, "config.data.image_size=4"),
        ({"channels": 4}, "config.data.channels=2"),
        ({"num_classes": 10}, "config.data.num_classes=3"),
        ({"flip": True}, "flip=false"),
    ],
)
def test_config_refusals_are_one_line(prepared, changes, says):
    with pytest.raises(UserError) as caught:
        make_source(dataclasses.replace(latent_config(prepared), **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"records": 8}, "counts 8 records"),
        ({"latent": {"vae_id": "test-vae"}}, "latent: scale is missing"),
        ({"shards": [{"file": "gone.array_record", "records": 7}]}, "gone.array_record is missing"),
    ],
)
def test_manifest_refusals(prepared, change, says):
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=says):
        make_source(latent_config(prepared))


def test_damaged_shards_are_named(prepared):
    shards = sorted(prepared.glob("*.array_record"))
    shards[0].write_bytes(shards[2].read_bytes())  # one record where the manifest says three
    damaged = bytearray(shards[1].read_bytes())
    damaged[150] ^= 255  # inside the first record
    shards[1].write_bytes(damaged)
    source = make_source(latent_config(prepared))
    with pytest.raises(UserError, match="latents-00000.*holds 1 records, the manifest says 3"):
        source[0]
    with pytest.raises(UserError, match=r"latents-00001.* is damaged at record 0"):
        source[3]
    assert source[4]["index"] == 4 and source[6]["index"] == 6
