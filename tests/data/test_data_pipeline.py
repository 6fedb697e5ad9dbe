"""The stream is a pure function of seed and position, for any number of readers and after any interruption."""

import json

import chex
import grain
import numpy as np
import pytest

from trm_diffusion.data.base import DataConfig
from trm_diffusion.data.pipeline import epoch_flips, epoch_order, make_iterator
from trm_diffusion.data.sources import make_source
from trm_diffusion.errors import UserError

NUM_RECORDS = 30
CONFIG = DataConfig(source="synthetic", image_size=2, num_classes=3, synthetic_records=NUM_RECORDS)


def take(count, config=CONFIG, state=None, **arguments):
    """The next `count` batches, and the state after them."""
    iterator = make_iterator(make_source(config), config, **{"seed": 0, "batch_size": 12} | arguments)
    if state is not None:
        iterator.set_state(state)
    batches = [next(iterator) for _ in range(count)]
    state = iterator.get_state()
    iterator.close()
    return batches, state


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


def test_batches_are_what_the_source_says():
    source = make_source(CONFIG)
    (batch,), _ = take(1)
    chex.assert_shape(batch["image"], (12, 2, 2, 1))
    chex.assert_shape([batch["label"], batch["index"]], (12,))
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == batch["index"].dtype == np.int32
    for row, index in enumerate(batch["index"]):
        chex.assert_trees_all_equal({name: values[row] for name, values in batch.items()}, source[index])


def test_every_epoch_reads_every_record_once_in_a_new_order():
    epochs = indices(take(10)[0]).reshape(4, NUM_RECORDS)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(NUM_RECORDS))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs[0], np.arange(NUM_RECORDS))


def test_seeds_give_different_orders_and_the_same_seed_the_same():
    first, again, other = (indices(take(2, seed=seed)[0]) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # Epoch 1 of one seed is not epoch 0 of the next.
    assert not np.array_equal(epoch_order(NUM_RECORDS, 5, 1), epoch_order(NUM_RECORDS, 6, 0))


def test_the_order_is_uniform():
    """Each record comes at each place about equally often: 5 sigma of 4,000 draws over 5 places."""
    orders = np.stack([epoch_order(5, seed, epoch) for seed in range(40) for epoch in range(100)])
    counts = np.stack([np.bincount(orders[:, place], minlength=5) for place in range(5)])
    assert abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


@pytest.mark.parametrize("process_count", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(process_count):
    config = DataConfig(**vars(CONFIG) | {"flip": True})
    whole, _ = take(5, config)
    parts = [take(5, config, rows=rows)[0] for rows in np.split(np.arange(12), process_count)]
    for step, batch in enumerate(whole):
        together = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        chex.assert_trees_all_equal(batch, together)
    # Two epochs of 30 records in five batches of 12: the processes partition each of them.
    shares = np.stack([indices(part).reshape(5, -1) for part in parts], axis=1).reshape(2, NUM_RECORDS)
    np.testing.assert_array_equal(np.sort(shares, axis=1), np.tile(np.arange(NUM_RECORDS), (2, 1)))


def test_a_batch_may_exceed_the_epoch():
    (batch,), _ = take(1, batch_size=2 * NUM_RECORDS + 6)
    counts = np.bincount(batch["index"], minlength=NUM_RECORDS)
    assert set(counts) == {2, 3} and (counts == 3).sum() == 6


def test_flips_mirror_half_of_the_images_anew_in_each_epoch():
    config = DataConfig(**vars(CONFIG) | {"flip": True, "synthetic_records": 400})
    source = make_source(config)
    (batch,), _ = take(1, config, batch_size=800)
    flipped = []
    for image, index in zip(batch["image"], batch["index"], strict=True):
        original = source[index]["image"]
        is_flipped = np.array_equal(image, original[:, ::-1])
        assert is_flipped or np.array_equal(image, original)
        flipped.append(is_flipped)
    by_epoch = np.array(flipped).reshape(2, 400)
    assert abs(by_epoch.mean(axis=1) - 0.5).max() < 0.125  # five sigma
    by_record = np.take_along_axis(by_epoch, batch["index"].reshape(2, 400).argsort(axis=1), axis=1)
    assert 100 < (by_record[0] != by_record[1]).sum() < 300
    np.testing.assert_array_equal(by_epoch[1], epoch_flips(400, 0, 1))


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_resumed_equals_uninterrupted(cut):
    config = DataConfig(**vars(CONFIG) | {"flip": True})
    whole, end = take(7, config)
    head, state = take(cut, config)
    tail, resumed_end = take(7 - cut, config, state=json.loads(json.dumps(state)))
    chex.assert_trees_all_equal(whole, head + tail)
    assert end == resumed_end == {"position": 84, "records": NUM_RECORDS, "seed": 0}


def test_set_state_moves_a_running_iterator_back():
    iterator = make_iterator(make_source(CONFIG), CONFIG, seed=0, batch_size=12)
    next(iterator)
    state = iterator.get_state()
    after = [next(iterator) for _ in range(3)]
    iterator.set_state(state)
    chex.assert_trees_all_equal(after, [next(iterator) for _ in range(3)])
    assert isinstance(iterator, grain.DatasetIterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_a_state_fits_other_process_counts_and_batch_sizes():
    whole = indices(take(6)[0])
    _, state = take(2, rows=np.arange(4, 8))
    tail, _ = take(6, batch_size=8, state=state)
    np.testing.assert_array_equal(indices(tail), whole[24:])


def test_worker_processes_read_the_same_stream_and_resume_in_it():
    """Flips and record ids included; a state saved with two workers resumes with none and with two."""
    config = DataConfig(flip=True)
    workers = DataConfig(flip=True, workers=2)
    whole, _ = take(6, config, batch_size=500)
    head, state = take(3, workers, batch_size=500)
    chex.assert_trees_all_equal(whole[:3], head)
    assert state["position"] == 1500
    assert {type(value) for batch in head for value in batch.values()} == {np.ndarray}
    chex.assert_trees_all_equal(whole[3:], take(3, config, batch_size=500, state=state)[0])
    chex.assert_trees_all_equal(whole[3:], take(3, workers, batch_size=500, state=state)[0])


def test_a_mistake_in_a_worker_arrives_as_the_same_mistake(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"not a png")
    config = DataConfig(source="image_folder", path=str(tmp_path), num_classes=1, workers=1)
    with pytest.raises(UserError, match=r"broken\.png"):
        take(1, config, batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"state": {"position": 12, "records": 31, "seed": 0}}, "records=31, this run has records=30"),
        ({"state": {"position": 12, "records": 30, "seed": 1}}, "seed=1, this run has seed=0"),
    ],
)
def test_mistakes_are_refused(arguments, says):
    with pytest.raises(UserError, match=says):
        take(1, **arguments)
