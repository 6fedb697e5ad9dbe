"""What training says about updates that it skips, because their loss or gradient is not finite."""

from collections.abc import Sequence

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.runtime.checkpoints import Checkpoints
from trm_diffusion.runtime.doubt import RECOVERED
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.parameters import Parameters


def first_bad(metrics: dict, trainable: Parameters, records: Sequence[str]) -> str:
    """What is not finite in a skipped update: a record of the batch, a parameter's gradient by its norm, or the loss.

    records: names of those that this process has read and that are not finite.
    """
    if records:
        return f"the data ({records[0]}{f' and {len(records) - 1} more' if len(records) > 1 else ''})"
    flags = np.asarray(metrics["nonfinite_gradients"])
    names = [name for name, bad in zip(sorted(trainable), flags, strict=True) if bad]
    return f"the gradient of {names[0]} ({len(names)} of {len(flags)} gradients)" if names else "the loss"


def tell_skipped(step: int, bad: str, checkpoints: Checkpoints | None) -> None:
    """Says that update `step` was skipped, and why; checkpoints: of the run, if this is the first skipped update."""
    kept = "" if checkpoints is None else f"; {_kept(checkpoints, step)}"
    say(f"update {step}: skipped, because {bad} is not finite{kept}")


def too_many_skipped(
    step: int, count: int, bad: str, checkpoints: Checkpoints, first: int, learning_rate: float | None
) -> UserError:
    """The error after `count` skipped updates in a row up to `step`; first: the first skipped update of this doubt.

    learning_rate: of this update; None if the data are to blame.
    """
    remedy = "repair the data"
    if learning_rate is not None:
        remedy = f"lower config.optim.lr (here {learning_rate:.3g}) or set config.optim.clip_norm"
    return UserError(
        f"{count} updates in a row up to {step} were not finite, the last in {bad}. "
        f"{_way_back(checkpoints, first)}{remedy}"
    )


def _kept(checkpoints: Checkpoints, skipped: int) -> str:
    older = [str(step) for step in checkpoints.steps() if step < skipped]
    if not older:
        return "there is no checkpoint from before it"
    listed = f"checkpoint {older[0]}" if len(older) == 1 else f"checkpoints {', '.join(older)}"
    return f"from before it, {listed} will be kept until {RECOVERED} updates in a row are finite"


def _way_back(checkpoints: Checkpoints, skipped: int) -> str:
    """Names the last good checkpoint from before the first `skipped` update, and how to go on from it.

    The good one is the newest with a finite update after it: a state whose very next update fails may be ruined.
    """
    older = [step for step in checkpoints.steps() if step < skipped]
    if not older:
        return f"There is no checkpoint from before update {skipped}, the first of these: start again, and "
    good = max([step for step in older if step < skipped - 1] or older)
    others = ", ".join(str(step) for step in older if step != good)
    return (
        f"The last good checkpoint is {good}, from before the first skipped update, {skipped}"
        + (f" (also kept: {others})" if others else "")
        + f": go on from it with --config.init.step={good}, and "
    )
