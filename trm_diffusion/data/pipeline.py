"""Turns a source of records into an endless stream of batches that is a pure function of (seed, position).

Every record read has a global position: 0, 1, 2, ... over all epochs and all processes. Position p is read in
epoch p // N, at place p % N of that epoch's order. Global batch b is the positions b * B ... (b + 1) * B - 1,
and a process reads those of its rows that its devices hold. So the rows of the global batch do not depend on
the number of processes or workers, every epoch reads every record exactly once, and the only state to save is
one number, the next position.

Grain prefetches, in threads or in worker processes. Its elements are whole batches here, because passing single
records through its shuffle, repeat and batch stages takes 5 to 7 ms for 128 digits, which is more than a small
model's training step; this way it takes about 1 ms.
"""

import functools
import multiprocessing
import os
import threading
import weakref

import grain
import numpy as np
from absl import flags
from etils import epath

from trm_diffusion.data.base import DataConfig, Source, check_labels
from trm_diffusion.errors import UserError
from trm_diffusion.readers.folders import list_files
from trm_diffusion.readers.records import read_json

# Independent random streams of one seed.
_ORDER_STREAM = 0
_FLIP_STREAM = 1
_RECORD_STREAM = 2

_ENDLESS = 2**40  # batches; grain needs a length
_MAX_READ_THREADS = 8

Batch = dict[str, np.ndarray]


def _words(seed: int, stream: int, counter: int) -> np.random.Philox:
    """The generator of one stream. Philox can start at any `counter` without computing those before it."""
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64))


# NumPy guarantees the same raw words in every version, but not the same results of `Generator`'s methods. Order and
# flips use the raw words, so that a run can be resumed years later.
@functools.lru_cache(maxsize=4)
def epoch_order(num_records: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a read-only permutation of 0 .. num_records - 1, int64 [num_records]."""
    words = _words(seed, _ORDER_STREAM, epoch).random_raw(num_records)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


@functools.lru_cache(maxsize=4)
def epoch_flips(num_records: int, seed: int, epoch: int) -> np.ndarray:
    """Which places of one epoch are flipped: read-only, bool [num_records], each True with probability 1/2."""
    flips = _words(seed, _FLIP_STREAM, epoch).random_raw(num_records) >> np.uint64(63) == 1
    flips.setflags(write=False)
    return flips


class _LocalBatches:
    """One process's share of every global batch from position `start` on, as a random-access source."""

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        flip: bool,
        batch_size: int,
        rows: np.ndarray,
    ):
        self._source = source
        self._seed = seed
        self._flip = flip
        self._batch_size = batch_size
        self._rows = rows.tolist()
        self.start = 0

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, batch_index: int) -> Batch:
        first = self.start + batch_index * self._batch_size
        elements = [self._read(first + row) for row in self._rows]
        batch = {name: np.stack([element[name] for element in elements]) for name in elements[0]}
        if "label" in batch:
            check_labels(batch["label"], self._source.num_classes, lambda row: self.name(batch["index"][row]))
        return batch

    def name(self, record: int) -> str:
        return self._source.name(int(record))

    def _read(self, position: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(position, len(self._source))
        index = int(epoch_order(len(self._source), self._seed, epoch)[place])
        if self._source.stochastic:
            rng = np.random.Generator(_words(self._seed, _RECORD_STREAM, position))
            element = self._source.sample(index, rng)
        else:
            element = self._source[index]
        if self._flip and epoch_flips(len(self._source), self._seed, epoch)[place]:
            element = element | {name: element[name][:, ::-1] for name in self._source.mirrored}
        return element


class BatchIterator(grain.DatasetIterator):
    """A grain iterator whose state is valid for any batch size, process count and worker count.

    `get_state` is {"position": records read by all processes together, "records": N, "seed": seed}, plain
    integers for JSON and the same in every process. `set_state` resumes exactly there: the next batch is the
    one that an uninterrupted run would have read. Call `close` at the end to stop threads and worker processes.
    """

    def __init__(self, batches: _LocalBatches, *, records: int, seed: int, batch_size: int, open_stream):
        super().__init__()
        self._batches = batches
        self._open_stream = open_stream
        self._batch_size = batch_size
        self._state = {"position": 0, "records": records, "seed": seed}
        self._stream = None
        self._stop_stream = _nothing
        self._ended = False

    def __next__(self) -> Batch:
        self.start_prefetch()
        batch = next(self._stream)
        self._state["position"] += self._batch_size
        # Workers send arrays in shared memory, which the operating system counts as leaked if it outlives the
        # loader: return plain arrays.
        return {key: value if type(value) is np.ndarray else np.array(value) for key, value in batch.items()}

    def start_prefetch(self) -> None:
        """Starts to prefetch; the first `next` does so too."""
        if self._ended:
            raise ValueError("the iterator is closed")
        if self._stream is None:
            self._batches.start = self._state["position"]
            self._stream = self._open_stream(self._batches)
            # Worker processes must end before the interpreter shuts down, even if nobody calls `close`.
            self._stop_stream = weakref.finalize(self, self._stream.close)
            self._stream.start_prefetch()

    def nonfinite_records(self, batch: Batch) -> list[str]:
        """Names of the records in a batch that hold NaN or an infinity."""
        bad = np.zeros(len(batch["index"]), bool)
        for values in batch.values():
            if values.dtype.kind == "f":
                bad |= ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        return [self._batches.name(record) for record in batch["index"][bad]]

    def get_state(self) -> dict[str, int]:
        return dict(self._state)

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to a saved position.

        Raises:
          UserError: the state was saved with another number of records or another seed.
        """
        for name in ("records", "seed"):
            if int(state[name]) != self._state[name]:
                raise UserError(
                    f"the saved data position belongs to {name}={int(state[name])}, this run has "
                    f"{name}={self._state[name]}: resume with the data and the seed of the first run"
                )
        self._stop_stream()
        self._stream = None
        self._state["position"] = int(state["position"])

    async def load(self, directory: epath.Path):
        """Moves to the position in a checkpoint. Every process wrote the same one, so any of their files will do."""

        async def move() -> None:
            names = [name for name in list_files(directory, [".json"]) if name.startswith("process_")]
            self.set_state(read_json(directory / min(names), {str: int}))

        return move()

    def close(self) -> None:
        self._ended = True
        self._stop_stream()
        self._stream = None
        super().close()


def _nothing() -> None:
    """Stops a stream that has not started."""


def make_iterator(
    source: Source,
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> BatchIterator:
    """Builds the endless, shuffled, resumable stream of one process's batches.

    Args:
      source: the records; an epoch is all `len(source)` of them, in a new order each time.
      config: `flip` and `workers` are used. With `workers` > 0 the calling script needs an
        `if __name__ == "__main__":` guard, because the workers are spawned.
      seed: 0 or more; it determines the order, the flips and the draws of a stochastic source.
      batch_size: records in the global batch; may exceed an epoch.
      rows: which rows of the global batch to read, int [R]; None means all.

    Returns:
      A grain iterator over NumPy batches {"image": float32 [R, H, W, C], "label": int32 [R], "index": int32 [R]}.

    Raises:
      UserError: an empty batch, a negative seed, or no records; on reading, a label that is none of the classes.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if seed < 0:
        raise UserError(f"seed={seed} must be 0 or more")
    if len(source) == 0:
        raise UserError("the data source holds no records: check its path and split in config.data")
    batches = _LocalBatches(
        source,
        seed=seed,
        flip=config.flip,
        batch_size=batch_size,
        rows=np.arange(batch_size) if rows is None else rows,
    )
    return BatchIterator(
        batches,
        records=len(source),
        seed=seed,
        batch_size=batch_size,
        open_stream=functools.partial(_open_stream, workers=config.workers, in_memory=source.in_memory),
    )


def _open_stream(batches: _LocalBatches, *, workers: int, in_memory: bool) -> grain.DatasetIterator:
    """Prefetches batches with grain: in threads of this process, or in worker processes."""
    # One thread is enough to build a batch while the previous one is trained on; more help only if they wait for
    # storage or decode images. With worker processes, these are the parallelism.
    threads = 1 if in_memory or workers else min(_MAX_READ_THREADS, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # in a notebook or a test: grain reads its own flags
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _end_with_parent)
    return iter(dataset)


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Ends a worker process when its parent is killed (SIGKILL); otherwise grain's workers would read on for ever."""
    del worker_index, worker_count

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
