"""Checkpoints: the only module that uses Orbax.

A checkpoint holds the training state, the data iterator, and a small JSON record of the loop. Saves are asynchronous
and become visible only when complete, so a job killed during a save resumes from the previous checkpoint.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as orbax

from trm_diffusion.errors import UserError, told
from trm_diffusion.models.settings import Settings, setting

_save_policies = orbax.training.save_decision_policies
_keep_policies = orbax.training.preservation_policies


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Settings):
    every: int = setting(1000, least=1)  # updates between saves; the last update is always saved
    keep: int = setting(2, least=1)  # most recent checkpoints kept
    keep_every: int = setting(0, least=0)  # also keep every checkpoint at a multiple of this many updates; 0 keeps none


class Checkpoints:
    """The checkpoints of one run, in `directory`.

    writes: False if the run may be another's, which may be saving at this moment; then nothing is written or deleted.
    Otherwise what an interrupted save left is deleted. Only one process at a time, or one run of several, may write.
    """

    def __init__(self, directory, config: CheckpointConfig | None = None, *, writes: bool = True):
        config = config or CheckpointConfig()
        keep = [_keep_policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(_keep_policies.EveryNSteps(config.keep_every))
        self.directory = directory
        self._checkpointer = orbax.training.Checkpointer(
            directory if "://" in str(directory) else os.path.abspath(directory),  # Orbax needs absolute paths
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),  # the training loop decides when
            preservation_policy=_keep_policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=writes,
        )

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state, iterator, loop: dict[str, Any]) -> None:
        """Starts an asynchronous save, after waiting for the previous one. `loop` must be JSON-serialisable.

        The error of a failed save is raised by the next `save` or by `close`.
        """
        with self._saving():
            self._checkpointer.wait()
            contents = dict(state=state, data=iterator, loop=loop)
            self._checkpointer.save_checkpointables_async(step, contents, overwrite=True)

    def restore(self, step: int, abstract_state, iterator=None) -> tuple[Any, dict[str, Any]]:
        """Returns the state, sharded like `abstract_state`, and the loop record; restores the position of `iterator`.

        Raises UserError, naming the paths, if the checkpoint does not hold exactly this state.
        """
        self._check(step, abstract_state)
        wanted = dict(state=abstract_state, loop=None)
        if iterator is not None:
            wanted["data"] = iterator
        loaded = self._checkpointer.load_checkpointables(step, wanted)
        return loaded["state"], loaded["loop"]

    def _check(self, step: int, abstract_state) -> None:
        saved = _shapes(self._checkpointer.checkpointables_metadata(step).metadata["state"])
        wanted = _shapes(abstract_state)
        problems = [f"missing {name}" for name in sorted(wanted.keys() - saved.keys())]
        problems += [f"unexpected {name}" for name in sorted(saved.keys() - wanted.keys())]
        problems += [
            f"{name} is {saved[name]}, not {wanted[name]}"
            for name in sorted(wanted.keys() & saved.keys())
            if saved[name] != wanted[name]
        ]
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(
                f"{self.directory}: checkpoint {step} does not match this config: {shown}; "
                "use the config of this run, or another --workdir"
            )

    def close(self) -> None:
        """Waits until all saves are complete on disk."""
        with self._saving():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns a failure to write into a UserError."""
        try:
            yield
        except Exception as error:
            reason = told(error)
            if reason is None:
                raise
            raise UserError(
                f"{self.directory}: a checkpoint cannot be saved; earlier ones are whole. {reason}"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_key(entry) for entry in path): tuple(leaf.shape) for path, leaf in flat}


def _key(entry) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
