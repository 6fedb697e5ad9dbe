"""Checkpoints: the only module that uses Orbax.

A checkpoint holds the training state, the data iterator, and a small JSON record of the loop. Saves are asynchronous
and become visible only when complete, so a job killed during a save resumes from the previous checkpoint. Then
process 0 adds the checksums of all files (runtime/checksums.py), which a restore compares.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as orbax

from trm_diffusion.errors import UserError, told
from trm_diffusion.models.settings import Settings, setting
from trm_diffusion.runtime.checksums import find_damage, read_checksums, write_checksums
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import barrier, first_of_all, from_main_process, is_distributed, is_main_process

_save_policies = orbax.training.save_decision_policies
_keep_policies = orbax.training.preservation_policies


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Settings):
    every: int = setting(1000, least=1)  # updates between saves; the last update is always saved
    keep: int = setting(2, least=1)  # most recent checkpoints kept
    keep_every: int = setting(0, least=0)  # also keep every checkpoint at a multiple of this many updates; 0 keeps none
    verify: bool = True  # compare a checkpoint with its checksums when it is restored


class _Protected:
    """Keeps all checkpoints older than the update `before`."""

    before = 0

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [checkpoint.step < self.before for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one run, in `directory`.

    writes: False if the run may be another's, which may be saving at this moment; then nothing is written or deleted.
    Otherwise what an interrupted save left is deleted. Only one process at a time, or one run of several, may write.
    """

    def __init__(self, directory, config: CheckpointConfig | None = None, *, writes: bool = True):
        config = config or CheckpointConfig()
        self._protected = _Protected()
        keep = [_keep_policies.LatestN(config.keep), self._protected]
        if config.keep_every:
            keep.append(_keep_policies.EveryNSteps(config.keep_every))
        self.directory = directory
        self._verifies = config.verify
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._checksums: concurrent.futures.Future | None = None  # of the last save
        self._checkpointer = orbax.training.Checkpointer(
            directory if "://" in str(directory) else os.path.abspath(directory),  # Orbax needs absolute paths
            save_decision_policy=_save_policies.FixedIntervalPolicy(1),  # the training loop decides when
            preservation_policy=_keep_policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=writes,
        )

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        """The update numbers of all checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def protect(self, before: int) -> None:
        """From now on no save deletes a checkpoint older than the update `before`; 0 protects none."""
        self._protected.before = before

    def save(self, step: int, state, iterator, loop: dict[str, Any]) -> None:
        """Starts an asynchronous save, after waiting for the previous one. `loop` must be JSON-serialisable.

        The error of a failed save is raised by the next `save` or by `close`.
        """
        with self._saving():
            self._checkpointer.wait()
            self._finish_checksums()
            contents = dict(state=state, data=iterator, loop=loop)
            saved = self._checkpointer.save_checkpointables_async(step, contents, overwrite=True)
        if is_main_process():
            self._checksums = self._background.submit(self._add_checksums, step, saved)

    def _add_checksums(self, step: int, saved) -> None:
        saved.result()
        write_checksums(epath.Path(self.directory) / str(step))

    def _finish_checksums(self) -> None:
        checksums, self._checksums = self._checksums, None
        if checksums is not None:
            checksums.result()

    def restore(self, step: int, abstract_state, iterator=None) -> tuple[Any, dict[str, Any]]:
        """Returns the state, sharded like `abstract_state`, and the loop record; restores the position of `iterator`.

        Raises UserError if a file is damaged, naming the newest sound checkpoint, and if the checkpoint does not hold
        exactly this state, naming the paths.
        """
        checksums = self._checksums_of(step)
        if is_distributed():  # before reading, where one process would wait for another that fails
            self._compare(step, checksums)
            return self._load(step, abstract_state, iterator)
        self._compare(step, checksums, large=False)  # before Orbax stumbles over one
        with concurrent.futures.ThreadPoolExecutor(1) as background:
            compared = background.submit(self._compare, step, checksums, large=True)  # while Orbax reads the same files
            try:
                return self._load(step, abstract_state, iterator)
            finally:
                compared.result()  # damage explains any error of the above

    def _load(self, step: int, abstract_state, iterator) -> tuple[Any, dict[str, Any]]:
        self._check(step, abstract_state)
        wanted = dict(state=abstract_state, loop=None)
        if iterator is not None:
            wanted["data"] = iterator
        loaded = self._checkpointer.load_checkpointables(step, wanted)
        return loaded["state"], loaded["loop"]

    def _checksums_of(self, step: int) -> str:
        """The checksums to compare a checkpoint with; "" if there are none, or if verification is off."""
        if not self._verifies:
            return ""
        checkpoint = epath.Path(self.directory) / str(step)
        checksums = from_main_process(read_checksums(checkpoint))
        if not checksums and is_main_process():
            say(f"{checkpoint} cannot be verified: it has no checksums (an older version or a killed job saved it)")
        return checksums

    def _compare(self, step: int, checksums: str, large: bool | None = None) -> None:
        """Raises UserError if a file is damaged. Each process compares its share; all raise the same error.

        large: compare only files of several chunks, or only the others.
        """
        if not checksums:
            return
        checkpoint = epath.Path(self.directory) / str(step)
        share = (jax.process_index(), jax.process_count())
        damage = first_of_all(find_damage(checkpoint, checksums, share, large))
        if damage and not checkpoint.exists():
            raise UserError(f"{checkpoint} was deleted while it was read; start the same command again")
        if damage:
            raise UserError(f"checkpoint {step} is damaged: {damage}, in {checkpoint}. {self._way_on(step)}")

    def _way_on(self, damaged: int) -> str:
        """Names the newest other checkpoint that is not damaged, and how to use it."""
        directory = epath.Path(self.directory)
        for step in sorted(set(self.steps()) - {damaged}, reverse=True):
            checksums = read_checksums(directory / str(step))
            if not checksums or not find_damage(directory / str(step), checksums):
                kind, note = ("sound", "") if checksums else ("other", " (it has no checksums)")
                return (
                    f"The newest {kind} checkpoint is {step}{note}: go on from it with --config.init.step={step} in "
                    f"that run's commands, or move {directory / str(damaged)} elsewhere"
                )
        return "No other checkpoint is sound: copy the file from a backup, or start again in another --workdir"

    def set_aside_newer(self, step: int) -> list[epath.Path]:
        """Process 0 moves the checkpoints newer than `step` to a directory beside theirs; returns their new paths."""
        directory, moved = epath.Path(self.directory), {}
        for newer in (other for other in self.steps() if other > step):
            target = directory.with_name(f"{directory.name}_set_aside") / str(newer)
            while target.exists():  # an earlier checkpoint of this update, set aside too
                target = target.with_name(f"{target.name}_")
            moved[directory / str(newer)] = target
        if moved:
            barrier("newer checkpoints are known")  # before the first is moved
            if is_main_process():
                for path, target in moved.items():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(target)
            barrier("newer checkpoints are set aside")
            self._checkpointer.reload()
        return list(moved.values())

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
            try:
                self._checkpointer.close()
            finally:
                self._finish_checksums()
                self._background.shutdown()

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
