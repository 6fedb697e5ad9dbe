"""Exported images: each depends only on its index, interruptions do not change a byte, and a set is one thing."""

import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.full_disk import full_disk
from tests.jobs.tiny import command, finished, tiny_config
from trm_diffusion.config import to_dict
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.diffusion.samplers import draw_initial_noise
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.jobs.evaluate import evaluate
from trm_diffusion.jobs.evaluate_images import sampling_record
from trm_diffusion.jobs.export_images import export
from trm_diffusion.jobs.sample import sample
from trm_diffusion.jobs.train import train
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.run.claim import claimed
from trm_diffusion.run.drawn_set import DrawnSet
from trm_diffusion.run.restore import load_run
from trm_diffusion.run.workdir import save_config
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.random import Purpose, key_for
from trm_diffusion.runtime.signals import StopRequest

COUNT = 11


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("run") / "tiny")
    train(tiny_config(), path, StopRequest())
    return path


def exported(workdir, out, stop=None, **overrides):
    """The names and bytes of all files that an export writes."""
    settings = {"sample__batch_size": 4, "evaluate__label_rule": "random"} | overrides
    export(tiny_config(**settings), workdir, stop or StopRequest(), COUNT, str(out))
    return contents(out)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def pixels(files):
    return np.stack([np.asarray(Image.open(epath.Path(file)), np.int32) for file in sorted(files.glob("*.png"))])


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "images"
    exported(workdir, folder)
    return folder


def test_what_an_export_leaves(whole):
    names = {f"{index:06d}.png" for index in range(COUNT)} | {"labels.npy", "sampling.json"}
    assert contents(whole).keys() == names
    assert pixels(whole).shape == (COUNT, 8, 8, 3) and len(np.unique(pixels(whole), axis=0)) == COUNT
    record = sampling_record(open_images(str(whole)))
    missing = [field for field, value in record.items() if value is None and field != "vae"]
    assert missing == [] and record["label_rule"] == "random" and record["samples"] == COUNT
    assert np.load(whole / "labels.npy").shape == (COUNT,)


def test_interrupted_and_started_again_ends_with_the_same_bytes(workdir, whole, tmp_path, monkeypatch):
    stop, save = StopRequest(), DrawnSet.save

    def stopping(*arguments):
        save(*arguments)
        stop.requested = True

    monkeypatch.setattr(DrawnSet, "save", stopping)
    with pytest.raises(Interrupted, match="stopped after 4 of 11 images"):
        exported(workdir, tmp_path / "images", stop)
    monkeypatch.undo()
    (tmp_path / "images" / "000002.png").unlink()  # as if killed within the first batch
    assert exported(workdir, tmp_path / "images") == contents(whole)


def test_nothing_is_drawn_twice(workdir, whole, monkeypatch):
    monkeypatch.setattr(DrawnSet, "save", None)  # would raise
    assert exported(workdir, whole) == contents(whole)


@pytest.mark.parametrize("size", [7, 64])
def test_images_do_not_depend_on_the_batch(workdir, whole, tmp_path, size):
    exported(workdir, tmp_path / "images", sample__batch_size=size)
    assert np.abs(pixels(tmp_path / "images") - pixels(whole)).max() <= 1
    assert (tmp_path / "images" / "labels.npy").read_bytes() == (whole / "labels.npy").read_bytes()


def test_noise_is_the_same_to_the_bit_in_every_batch():
    keys = jax.vmap(lambda index: key_for(0, Purpose.SAMPLING, index))(jnp.arange(64))
    whole = jax.jit(lambda keys: draw_initial_noise(keys, (8, 8, 1)))(keys)
    for first in range(0, 63, 7):
        part = jax.jit(lambda keys: draw_initial_noise(keys, (8, 8, 1)))(keys[first : first + 7])
        np.testing.assert_array_equal(part, whole[first : first + 7])


def as_command(workdir, directory, count: int, **overrides) -> tuple[str, ...]:
    """The flags of an export of the tiny run."""
    settings = to_dict(tiny_config(evaluate__label_rule="random", **overrides))
    (directory / "tiny.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )
    return (f"--config={directory / 'tiny.py'}", f"--workdir={workdir}", "--mode=sample", f"--num={count}")


def test_killed_and_started_again_ends_with_the_same_bytes(workdir, tmp_path):
    count = 400
    flags = as_command(workdir, tmp_path, count, sample__batch_size=1)
    finished(command(*flags, f"--out={tmp_path / 'whole'}"))
    process, images = command(*flags, f"--out={tmp_path / 'killed'}"), tmp_path / "killed"
    while process.poll() is None and len(list(images.glob("*.png"))) < 20:
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=300)
    assert 20 <= len(list(images.glob("0*.png"))) < count
    finished(command(*flags, f"--out={images}"))
    assert contents(images) == contents(tmp_path / "whole")  # nothing half-written is left


def test_eight_devices_and_the_command_line_give_the_same_images(workdir, whole, tmp_path):
    flags = as_command(workdir, tmp_path, COUNT, train__batch_size=16)
    finished(command(*flags, f"--out={tmp_path / 'images'}", devices=8))
    assert (tmp_path / "images" / "labels.npy").read_bytes() == (whole / "labels.npy").read_bytes()
    assert np.abs(pixels(tmp_path / "images") - pixels(whole)).max() <= 1


def test_one_npz_holds_the_same(workdir, whole, tmp_path):
    export(tiny_config(evaluate__label_rule="random"), workdir, StopRequest(), COUNT, str(tmp_path / "all.npz"))
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.abs(arrays["arr_0"].astype(int) - pixels(whole)).max() <= 1
        np.testing.assert_array_equal(arrays["arr_1"], np.load(whole / "labels.npy"))
    assert sampling_record(open_images(str(tmp_path / "all.npz")))["sampler"] == "euler"


def test_a_set_is_only_continued_as_it_was_begun(workdir, whole, tmp_path):
    before = contents(whole)
    for changes, says in (
        (dict(sample__diffusion_steps=3), "drawn with diffusion_steps = 2, not 3: remove it, or give another --out"),
        (dict(sample__sampler="heun"), "drawn with sampler = 'euler', not 'heun'"),
        (dict(sample__latent_steps=3), "drawn with latent_steps = 2, not 3"),
        (dict(sample__guidance=3.0), "drawn with guidance_scale = 2.0, not 3.0"),
        (dict(sample__guidance_interval=(0.0, 0.5)), r"drawn with guidance_interval = \[0.0, 1.0\], not \[0.0, 0.5\]"),
        (dict(sample__seed=1), "drawn with sample_seed = 0, not 1"),
        (dict(sample__parameters="raw"), "drawn with parameters = 'ema 0.9', not 'raw'"),
        (dict(evaluate__label_rule="balanced"), "drawn with label_rule = 'random', not 'balanced'"),
        (dict(model__recursion__halting="convergence"), "config.model.recursion.halting = 'none', not 'convergence'"),
        (dict(model__recursion__halting_epsilon=0.1), "config.model.recursion.halting_epsilon = 0.05, not 0.1"),
    ):
        with pytest.raises(UserError, match=says):
            exported(workdir, whole, **changes)
    with pytest.raises(UserError, match="drawn with samples = 11, not 5"):
        export(tiny_config(evaluate__label_rule="random"), workdir, StopRequest(), 5, str(whole))
    assert contents(whole) == before
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").write_bytes(before["000000.png"])
    with pytest.raises(UserError, match=r"images is not empty and has no sampling\.json in it: give another --out"):
        exported(workdir, tmp_path / "images")


def spoilt_run(workdir, directory, change):
    """A copy of the run in which `change` was applied to every parameter of its checkpoint."""
    config, copy = tiny_config(), epath.Path(directory) / "run"
    experiment, state = load_run(config, workdir)
    spoilt = jax.tree.map(lambda leaf: change(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)
    iterator = make_iterator(experiment.condition.source(), config.data, seed=0, batch_size=8)
    save_config(copy, config)
    with Checkpoints(copy / "checkpoints") as checkpoints:
        checkpoints.save(int(state.step), spoilt, iterator, {"updates": 0})
    iterator.close()
    return copy


def test_other_weights_of_the_same_update_are_refused(workdir, whole, tmp_path):
    other = spoilt_run(workdir, tmp_path, lambda leaf: 1.01 * leaf)
    with pytest.raises(UserError, match="drawn with weights_sha256 = '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        exported(other, whole)


def test_images_that_are_not_finite_are_an_error(workdir, tmp_path):
    ruined = spoilt_run(workdir, tmp_path, lambda leaf: jnp.nan * leaf)
    with pytest.raises(UserError, match=r"images hold values that are not finite, the first is 000000\.png"):
        exported(ruined, tmp_path / "images")
    assert not list((tmp_path / "images").glob("*.png"))
    with pytest.raises(UserError, match="10 of 10 images hold values that are not finite, the first is number 0"):
        sample(tiny_config(), ruined, StopRequest())
    with pytest.raises(UserError, match="30 of 30 images hold values that are not finite"):
        evaluate(tiny_config(evaluate__kind="digits", evaluate__num_samples=30), ruined, StopRequest())


def test_what_was_damaged_or_swapped_is_made_again(workdir, whole, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(whole, folder)
    (folder / "000001.png").write_bytes((whole / "000002.png").read_bytes())
    (folder / "000002.png").write_bytes((whole / "000001.png").read_bytes())
    (folder / "000009.png").write_bytes((whole / "000009.png").read_bytes()[:-20])
    np.save(folder / "labels.npy", np.load(whole / "labels.npy")[::-1])
    assert exported(workdir, folder) == contents(whole)
    printed = capsys.readouterr().err
    assert "3 images in" in printed and "the first is 000001.png" in printed and "labels.npy does not hold" in printed
    os.truncate(folder / "labels.npy", 100)
    assert exported(workdir, folder) == contents(whole)
    (folder / "mine.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 1 other images, such as mine\.jpg: move them away"):
        exported(workdir, folder)


def test_an_npz_is_only_replaced_by_the_same_set(workdir, tmp_path):
    def into_npz(**changes):
        config = tiny_config(evaluate__label_rule="random", **changes)
        export(config, workdir, StopRequest(), COUNT, str(tmp_path / "all.npz"))

    into_npz()
    before = (tmp_path / "all.npz").read_bytes()
    shutil.rmtree(tmp_path / "all")
    with pytest.raises(UserError, match=r"all\.npz holds images drawn with sample_seed = 0, not 1"):
        into_npz(sample__seed=1)
    into_npz()
    assert (tmp_path / "all.npz").read_bytes() == before
    (tmp_path / "all.sampling.json").unlink()
    with pytest.raises(UserError, match=r"all\.npz exists and has no all\.sampling\.json: give another --out"):
        into_npz()


def test_a_folder_in_use_is_refused(workdir, tmp_path):
    with claimed(tmp_path, "--mode=sample", StopRequest()), pytest.raises(UserError, match="is in use: --mode=sample"):
        exported(workdir, tmp_path)


def test_a_full_disk_is_one_line(workdir, tmp_path):
    with full_disk(350), pytest.raises(UserError, match="sampling.json cannot be written .File too large.: free some"):
        exported(workdir, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_latents_cannot_be_exported(workdir, tmp_path):
    config = tiny_config(data__source="synthetic", data__channels=4)
    with pytest.raises(
        UserError, match="config.data.channels=4: latents are exported .* autoencoder in config.data.vae"
    ):
        export(config, workdir, StopRequest(), COUNT, str(tmp_path))
