"""Preparing latents: values and manifest are right, interruptions and sharing change no byte, damage is found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.data.written import write_latents
from tests.full_disk import full_disk
from tests.jobs.tiny import ROOT, command, finished, tiny_config, write_tiny_vae
from trm_diffusion.data.images import ImageFolderSource
from trm_diffusion.data.latents import LatentSource, ShardWriter, read_manifest
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.jobs.prepare_latents import LatentJob, prepare
from trm_diffusion.jobs.verify_data import verify
from trm_diffusion.run.claim import CLAIM, claimed
from trm_diffusion.runtime.signals import StopRequest
from trm_diffusion.weights.store import load_vae

IMAGES, PER_SHARD, BAD = 45, 10, "3/0013.png"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny autoencoder, and real digits as 16x16 pictures in a folder per class, one of them damaged."""
    place = tmp_path_factory.mktemp("prepare")
    write_tiny_vae(place / "vae")
    digits = load_digits()
    for index in range(IMAGES):
        path = place / "images" / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize((20, 16)).save(path)
    (place / "images" / BAD).write_bytes(b"no picture")
    return place


def config_of(place, **overrides):
    fields = dict(data__source="image_folder", data__path=str(place / "images"), data__vae=str(place / "vae"))
    return tiny_config(**fields | dict(data__channels=4, data__flip=True) | overrides)


def prepared(place, out, config=None, stop=None, process=(0, 1)):
    share = dict(process_index=process[0], process_count=process[1])
    prepare(config or config_of(place), str(out), stop or StopRequest(), images_per_shard=PER_SHARD, **share)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(place):
    prepared(place, place / "whole")
    return place / "whole"


def test_records_are_the_moments_of_the_images_and_of_their_mirror_images(place, whole):
    vae, spec = load_vae(place / "vae", 8)
    latents = LatentSource(str(whole))
    assert latents.spec == spec and spec.vae_id.startswith("sha256:") and len(latents) == 2 * (IMAGES - 1)
    images = make_source(config_of(place, data__image_size=16, data__channels=3).data)
    readable = [images[index] for index in range(IMAGES) if images.name(index) != BAD]
    pixels = jnp.stack([view for element in readable for view in (element["image"], element["image"][:, ::-1])])
    mean, _ = jax.jit(vae.encode)(pixels)
    found = np.stack([latents[index]["image"] for index in range(len(latents))])
    np.testing.assert_allclose(found, spec.normalize(np.asarray(mean)), atol=2e-3)
    labels = [int(latents[index]["label"]) for index in range(0, len(latents), 2)]
    assert labels == [int(element["label"]) for element in readable]


def test_the_manifest_counts_and_names(whole):
    manifest = read_manifest(whole)
    assert manifest["records"] == sum(manifest["class_counts"]) == 88
    assert [shard["records"] for shard in manifest["shards"]] == [20, 18, 20, 20, 10]
    (bad,) = manifest["bad_images"]
    assert bad["name"] == BAD and "cannot identify" in bad["reason"]
    preparation = manifest["preparation"]
    assert preparation["images"] == IMAGES and preparation["flip"] is True and preparation["image_size"] == 16
    assert preparation["vae"]["id"] == manifest["latent"].vae_id and manifest["written_by"]["jax"] == jax.__version__


def test_stopped_and_shared_by_two_it_ends_with_the_same_bytes(place, whole, tmp_path, monkeypatch):
    stop, write_shard = StopRequest(), LatentJob.write_shard

    def stopping(self, index, advance):
        stop.requested = index == 2
        return write_shard(self, index, advance)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="in shard 3 of 5, after 10 of 25 images"):
        patch.setattr(LatentJob, "write_shard", stopping)
        prepared(place, tmp_path, stop=stop, process=(0, 2))
    assert len(contents(tmp_path)) == 2  # one shard and the file about it
    prepared(place, tmp_path, process=(1, 2))
    with pytest.raises(UserError, match=r"no manifest\.json"):
        LatentSource(str(tmp_path))
    (tmp_path / "latents-00003.json").unlink()  # as if killed before it was written
    os.truncate(tmp_path / "latents-00001.array_record", 100)  # as if the disk had lost the rest
    made = []
    monkeypatch.setattr(
        LatentJob, "write_shard", lambda self, index, advance: made.append(index) or write_shard(self, index, advance)
    )
    prepared(place, tmp_path)
    assert made == [1, 2, 3, 4] and contents(tmp_path) == contents(whole)


def test_killed_and_run_by_two_processes_on_other_device_counts_it_is_the_same(place, whole, tmp_path):
    """Through the command line: SIGKILL in the middle of a shard, then two processes, one of them with two devices."""
    settings = (
        "--config=configs/imagenet256.py:model=S/2,recursion=off",
        "--config.data.source=image_folder",
        f"--config.data.path={place / 'images'}",
        f"--config.data.vae={place / 'vae'}",
        "--config.data.image_size=8",
        "--config.data.num_classes=10",
        "--config.sample.classes=1,2",
        "--config.data.flip=true",
        f"--images_per_shard={PER_SHARD}",
        f"--out={tmp_path}",
    )
    killed = [sys.executable, "-m", "tests.jobs.killed_in_shard", "--mode=prepare", *settings]
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    claim, left, *whole_files = sorted(contents(tmp_path))
    assert claim == CLAIM
    assert whole_files == ["latents-00000.array_record", "latents-00000.json"]
    assert left.startswith(".latents-00001.array_record.partial-")
    share = [f"--process_index={index}" for index in (0, 1)]
    pair = [command("--mode=prepare", *settings, "--process_count=2", share[i], devices=i + 1) for i in (0, 1)]
    _, err = [finished(process) for process in pair][-1]
    assert "shard" in err
    assert contents(tmp_path) == contents(whole)
    out, _ = finished(command("--mode=verify", *settings))
    report = json.loads(out.splitlines()[-1])
    assert report["pass"] is True and report["records"] == 88 and report["bad_images"] == 1


def test_a_directory_in_use_is_refused(place, tmp_path):
    with claimed(tmp_path / "out", "--mode=prepare", StopRequest()):
        with pytest.raises(UserError, match=f"{tmp_path / 'out'} is in use: --mode=prepare by process"):
            prepared(place, tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(place, tmp_path):
    with full_disk(5000), pytest.raises(UserError, match="latents-00000.array_record cannot be written .*free some sp"):
        prepared(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_made_otherwise_is_refused(place, whole, tmp_path):
    before = contents(whole)
    with pytest.raises(UserError, match="made with flip = True, not False: remove it, or give another --out"):
        prepared(place, whole, config_of(place, data__flip=False))
    other = write_tiny_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="made with vae = "):
        prepared(place, whole, config_of(place, data__vae=other))
    assert contents(whole) == before
    for changes, says in (
        (dict(data__vae=""), "needs --config.data.vae=DIR"),
        (dict(data__vae=str(place)), "holds no converted autoencoder"),
        (dict(data__channels=3), "config.data.channels is 3, but .* have 4"),
        (dict(data__source="digits"), "set config.data.source to one of image_folder, image_tars, tfds"),
    ):
        with pytest.raises(UserError, match=says):
            prepared(place, tmp_path / "refused", config_of(place, **changes))
    assert not (tmp_path / "refused").exists()


def test_images_that_changed_under_their_names_are_noticed(place, tmp_path, monkeypatch):
    """A touched image is hashed and found equal; a changed one is named, with the shards to remove."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(place / "images", images)
    config = config_of(place, data__path=str(images))
    prepared(place, out, config)
    before, names = contents(out), sorted(str(path.relative_to(images)) for path in images.glob("*/*.png"))
    monkeypatch.setattr(ImageFolderSource, "content", None)  # would raise: nothing is hashed while nothing changes
    prepared(place, out, config)
    monkeypatch.undo()
    os.utime(images / names[3], ns=(0, 1))
    prepared(place, out, config)
    assert contents(out) == before
    changed = sorted((names[12], names[34], BAD))
    for name in changed:
        Image.new("L", (20, 16), 99).save(images / name)
    with pytest.raises(UserError) as caught:
        prepared(place, out, config)
    stale = sorted({f"latents-{names.index(name) // PER_SHARD:05d}" for name in changed})
    remedy = f"remove {' '.join(f'{name}.*' for name in stale)} there and run this again"
    assert f"for 3 records ({', '.join(changed)}): {remedy}" in str(caught.value)
    assert contents(out) == before
    for name in stale:
        for path in out.glob(f"{name}.*"):
            path.unlink()
    prepared(place, out, config)
    assert verify(str(out)) and read_manifest(out)["records"] == 90 and read_manifest(out)["bad_images"] == []


def test_latents_of_before_origins_were_kept_are_continued(place, whole, tmp_path):
    copy = damaged(tmp_path, whole)
    for path in copy.glob("latents-*.json"):
        record = json.loads(path.read_text())
        assert len(record.pop("origins")) == min(PER_SHARD, IMAGES - PER_SHARD * int(path.stem[-5:]))
        path.write_text(json.dumps(record, indent=1) + "\n")
    before = contents(copy)
    prepared(place, copy)
    assert contents(copy) == before and verify(str(copy))


def damaged(tmp_path, whole):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(whole).items():
        (copy / name).write_bytes(content)
    return copy


def edit_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip_a_byte(directory):
    path = directory / "latents-00002.array_record"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_a_byte, "latents-00002.array_record is damaged: its checksum is not the manifest's"),
        (lambda d: (d / "latents-00001.array_record").unlink(), "latents-00001.array_record is missing"),
        (lambda d: (d / "latents-00001.json").unlink(), "latents-00001.json is missing"),
        (lambda d: (d / "latents-00001.json").write_text("{"), "latents-00001.json is damaged"),
        (lambda d: edit_manifest(d, lambda m: m["latent"].update(scale=0.13)), "latent is not what"),
        (lambda d: edit_manifest(d, lambda m: m["bad_images"].clear()), "bad_images is not what"),
        (lambda d: (d / "latents-00009.array_record").write_bytes(b""), "latents-00009.array_record is not in the"),
    ],
)
def test_verify_finds(place, whole, tmp_path, capsys, damage, says):
    copy = damaged(tmp_path, whole)
    assert verify(str(copy)) and json.loads(capsys.readouterr().out)["pass"] is True
    damage(copy)
    assert not verify(str(copy))
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert says in lines[0] and len(lines) <= 2 and captured.out == ""


def test_verify_compares_with_the_config(place, whole, tmp_path, capsys):
    assert verify(str(whole), config_of(place))
    for changes, says in (
        (dict(data__num_classes=11), "set config.data.num_classes=10"),
        (dict(data__vae=write_tiny_vae(tmp_path / "other", scale=0.25)), "scale 0.5, not the 0.25"),
    ):
        assert not verify(str(whole), config_of(place, **changes))
        assert says in capsys.readouterr().err


def test_verify_finds_values_that_are_not_finite_and_wrong_labels(tmp_path, capsys, monkeypatch):
    """The writer refuses such values, so its check is switched off here."""
    _, spec = load_vae(write_tiny_vae(tmp_path / "vae"), 2)
    encode = ShardWriter._encode
    monkeypatch.setattr(
        ShardWriter, "_encode", lambda self, mean, std, label: encode(self, mean, std, 0)[:-2] + b"\x00\x7e"
    )
    shape = (2, 2, 4)
    write_latents(tmp_path / "latents", spec, 2, [(np.zeros(shape), np.ones(shape), 1)])
    assert not verify(str(tmp_path / "latents"))
    assert "record 0 holds values that are not finite" in capsys.readouterr().err


def test_imagenet_of_tfds(place, tmp_path):
    import tensorflow_datasets as tfds

    config = config_of(
        place, data__source="tfds", data__path=str(tmp_path), data__num_classes=1000, data__image_size=16
    )
    with tfds.testing.mock_data(num_examples=6):
        prepared(place, tmp_path / "latents", config)
    latents = LatentSource(str(tmp_path / "latents"))
    assert len(latents) == 12 and latents.num_classes == 1000 and latents.sample_shape == (16, 16, 4)
    assert read_manifest(tmp_path / "latents")["preparation"]["tfds_name"] == "imagenet2012"
    assert verify(str(tmp_path / "latents"))


@pytest.mark.parametrize("kind", ["a tar for each class", "labels beside"])
def test_tars_hold_the_same_images_as_the_folder(place, tmp_path, kind):
    """With "labels beside", two tars mix the classes and hold a label file beside each image."""
    for path in sorted((place / "images").glob("*/*.png")):
        name = path.parent.name if kind == "a tar for each class" else str(int(path.stem) % 2)
        with tarfile.open(tmp_path / f"{name}.tar", "a") as tar:
            tar.add(path, path.name)
            if kind == "labels beside":
                label = tmp_path / "label"
                label.write_text(path.parent.name)
                tar.add(label, f"{path.stem}.cls")
    folder = make_source(config_of(place, data__channels=3).data)
    tars = make_source(config_of(place, data__channels=3, data__source="image_tars", data__path=str(tmp_path)).data)
    assert tars.num_classes == 10 and len(tars) == IMAGES

    def by_name(source):
        return {source.name(i).rpartition("/")[2]: i for i in range(IMAGES)}

    names, others = by_name(folder), by_name(tars)
    assert names.keys() == others.keys()
    for name in names.keys() - {os.path.basename(BAD)}:
        one, other = folder[names[name]], tars[others[name]]
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["label"] == other["label"]
    with pytest.raises(UserError, match=r"cannot read the image .*\.tar/0013.png \(cannot identify image file\)"):
        tars[others[os.path.basename(BAD)]]  # no memory address in the message
