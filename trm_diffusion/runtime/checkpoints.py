"""Checkpoints: the one place that knows Orbax.

A checkpoint holds the training state, the data iterator, and a small JSON record of the loop. Saves are asynchronous
and become visible only when complete, so a job killed while saving resumes from the save before.
"""

import dataclasses
import os
from typing import Any

import jax
from orbax.checkpoint import v1 as orbax

from trm_diffusion.errors import UserError
from trm_diffusion.models.settings import Settings, setting

_save_policies = orbax.training.save_decision_policies
_keep_policies = orbax.training.preservation_policies


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Settings):
    every: int = setting(1000, least=1)  # updates between saves; the last update is always saved
    keep: int = setting(2, least=1)  # most recent checkpoints kept
    keep_every: int = setting(0, least=0)  # also keep every checkpoint at a multiple of this many updates; 0 keeps none


class Checkpoints:
    """The checkpoints of one run, in `directory`."""

    def __init__(self, directory, config: CheckpointConfig | None = None):
        config = config or CheckpointConfig()
        keep = [_keep_policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(_keep_policies.EveryNSteps(config.keep_every))
        self.directory = directory
        self._checkpointer = orbax.training.Checkpointer(
            directory if "://" in str(directory) else os.path.abspath(directory),  # it saves to absolute paths alone
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),  # the loop decides when
            preservation_policy=_keep_policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state, iterator, loop: dict[str, Any]) -> None:
        """Starts a save and returns; waits first for the one before. `loop` is JSON.

        A failed save raises here at the next one, or in `close`.
        """
        self._checkpointer.wait()
        self._checkpointer.save_checkpointables_async(step, dict(state=state, data=iterator, loop=loop), overwrite=True)

    def restore(self, step: int, abstract_state, iterator=None) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract_state` says, and the loop record; `iterator` is moved to where it was.

        Raises UserError, naming paths, where the checkpoint does not hold exactly that state.
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
                f"{self.directory}: checkpoint {step} does not fit this config: {shown}; "
                "use the run's own config, or another --workdir"
            )

    def close(self) -> None:
        """Waits until every save is complete on disk."""
        self._checkpointer.close()

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
