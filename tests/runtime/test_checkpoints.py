"""Checkpoints restore to the bit; a state that does not match is refused by path; old checkpoints are deleted."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.full_disk import full_disk
from tests.jobs.tiny import tiny_config
from trm_diffusion.data.pipeline import make_iterator
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError
from trm_diffusion.experiment import build
from trm_diffusion.runtime.checkpoints import CheckpointConfig, Checkpoints
from trm_diffusion.runtime.window import Window

SMALL = {"step": jnp.asarray(3, jnp.int32), "trainable": {"stack/kernel": jnp.arange(6.0).reshape(2, 3)}}
LOOP = {"sums": {"loss": 0.1 + 0.2, "expert_load": [1 / 3, 2 / 3]}, "updates": 1, "skipped_in_a_row": 0}


def batches(seed=0):
    config = tiny_config()
    return make_iterator(make_source(config.data), config.data, seed=seed, batch_size=8)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path / "checkpoints")


def test_state_iterator_and_loop_come_back(directory):
    experiment = build(tiny_config())
    state, iterator = experiment.init_state(), batches()
    for _ in range(3):
        next(iterator)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, iterator, LOOP)
        following = next(iterator)["index"]  # read while the save may still run
    with Checkpoints(directory) as checkpoints:
        other = batches()
        assert checkpoints.latest_step() == 3
        restored, loop = checkpoints.restore(3, experiment.abstract_state, other)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, experiment.abstract_state)
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, state)
    assert loop == LOOP
    np.testing.assert_array_equal(next(other)["index"], following)
    iterator.close()
    other.close()


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    iterator = batches()
    with Checkpoints(epath.Path("run/checkpoints")) as checkpoints:
        checkpoints.save(1, SMALL, iterator, LOOP)
    assert (tmp_path / "run/checkpoints/1").is_dir()
    iterator.close()


def test_the_state_may_be_read_without_the_iterator(directory):
    iterator = batches()
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, jax.tree.map(jnp.zeros_like, SMALL), iterator, LOOP | {"updates": 9})
        checkpoints.save(1, SMALL, iterator, LOOP)  # saved again, as after a resume: replaces the first
    with Checkpoints(directory) as checkpoints:
        restored, loop = checkpoints.restore(1, abstract(SMALL))
    chex.assert_trees_all_equal(restored, SMALL)
    assert loop == LOOP
    iterator.close()


def test_a_window_record_goes_through_unchanged(directory):
    window, iterator = Window({}, batch_size=8), batches()
    values = {"loss": 1 / 3, "gradient_norm": 0.7, "quarter_loss_sum": [0.1] * 4, "quarter_images": [2.0] * 4}
    values |= {"skipped": 0.0, "learning_rate": 0.1}
    window.add({name: np.asarray(value, np.float32) for name, value in values.items()})
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, SMALL, iterator, window.record())
    with Checkpoints(directory) as checkpoints:
        _, loop = checkpoints.restore(1, abstract(SMALL))
    assert loop == json.loads(json.dumps(window.record()))
    iterator.close()


def test_a_state_that_does_not_fit_is_refused_by_path(directory):
    iterator = batches()
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, SMALL, iterator, LOOP)
    iterator.close()
    wanted = {
        "step": jnp.zeros((), jnp.int32),
        "trainable": {"stack/kernel": jnp.zeros((2, 4)), "stack/bias": jnp.zeros(2)},
    }
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(1, abstract(wanted))
        with pytest.raises(UserError, match="unexpected trainable/stack/kernel"):
            checkpoints.restore(1, abstract({"step": SMALL["step"]}))
    message = str(error.value)
    assert "missing trainable/stack/bias" in message and "\n" not in message
    assert "trainable/stack/kernel is (2, 3), not (2, 4)" in message


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_twelve_layers_do_not_go_into_sixteen(directory, scan):
    small = dict(model__width=4, model__heads=1, model__recursion__blocks="none", model__scan_blocks=scan)
    twelve, sixteen = (build(tiny_config(model__depth=depth, **small)) for depth in (12, 16))
    iterator = batches()
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), twelve.abstract_state)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state, iterator, LOOP)
    iterator.close()
    stacked, apart = r"stack/segments/0/.* is \(12, .*\), not \(16, ", "missing .*stack/segments/12/.*; and .* more"
    expected = stacked if scan else apart
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError, match=expected):
            checkpoints.restore(1, sixteen.abstract_state)


def test_the_latest_are_kept_and_every_so_many(directory):
    iterator = batches()
    with Checkpoints(directory, CheckpointConfig(keep=2, keep_every=4)) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, SMALL, iterator, LOOP)
    assert sorted(int(path.name) for path in directory.iterdir()) == [4, 8, 9, 10]
    iterator.close()


def test_a_half_written_checkpoint_is_passed_over(directory):
    iterator = batches()
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, SMALL, iterator, LOOP)
    half = directory / "3.orbax-checkpoint-tmp"  # left behind by a job killed during a save
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"torn")
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest_step() == 2
        chex.assert_trees_all_equal(checkpoints.restore(2, abstract(SMALL))[0], SMALL)
        checkpoints.save(3, SMALL, iterator, LOOP)
        checkpoints.close()
        assert checkpoints.latest_step() == 3
    iterator.close()


def test_a_reader_leaves_a_save_in_progress_alone(directory):
    iterator = batches()
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, SMALL, iterator, LOOP)
    iterator.close()
    saving = directory / "2.orbax-checkpoint-tmp"
    (saving / "state").mkdir(parents=True)
    with Checkpoints(directory, writes=False) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(1, abstract(SMALL))[0], SMALL)
    assert (saving / "state").exists()


def test_a_save_to_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoints(directory):
    iterator = batches()
    for bytes_left in (0, 200, 2000):  # metadata, the loop's record, arrays
        with pytest.raises(UserError) as error, Checkpoints(directory) as checkpoints:
            checkpoints.save(1, SMALL, iterator, LOOP)
            checkpoints._checkpointer.wait()
            checkpoints._finish_checksums()
            with full_disk(bytes_left):
                large = {"w": jnp.asarray(np.random.default_rng(0).random(1000))}
                checkpoints.save(2, SMALL | large, iterator, LOOP)
                checkpoints.close()
        line = f"{directory}: a checkpoint cannot be saved; earlier ones are whole. a file cannot be written (File too"
        assert line in str(error.value) and "free some space" in str(error.value) and "\n" not in str(error.value)
    iterator.close()
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest_step() == 1
        chex.assert_trees_all_equal(checkpoints.restore(1, abstract(SMALL))[0], SMALL)


def test_a_save_that_fails_is_not_passed_over_in_silence(directory):
    iterator = batches()
    with pytest.raises(Exception, match="object"):  # noqa: B017  the library's own error
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(1, SMALL, iterator, {"not JSON": object()})
    iterator.close()
