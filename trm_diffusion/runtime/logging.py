"""Logging of metrics to metrics.jsonl, TensorBoard, Weights & Biases (on request), and the terminal.

metrics.jsonl is the authoritative record. A resumed run first drops the lines past its checkpoint, so that the file
equals that of an uninterrupted run, except for the wall-clock fields. It also drops damaged lines, and says so.
"""

import contextlib
import dataclasses
import datetime
import json
import re
import sys

import tqdm
from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.files import replacing, writing
from trm_diffusion.models.settings import Settings, setting

_LINE = re.compile(rb'\{"step": (\d{1,18})(?:, [ -z|~]*)?\}\n?')  # a whole line as `MetricsFile` writes it
WALL_CLOCK_FIELDS = ("images_per_second", "data_wait_share", "seconds")


@dataclasses.dataclass(frozen=True)
class LogConfig(Settings):
    every: int = setting(50, least=1)  # updates per line of metrics, whose values are means over them
    tensorboard: bool = True  # write TensorBoard event files into the workdir
    wandb: bool = False  # also log to Weights & Biases (package wandb, project trm_diffusion)
    # updates between measurements of what latent steps do (jobs/liveness.py), also after the last update; 0 is never
    liveness_every: int = setting(1000, least=0)
    samples_every: int = setting(1000, least=0)  # updates between sample grids; 0 draws none


class MetricsFile:
    """metrics.jsonl of a run: one JSON object per line, whose first key `step` is the update number."""

    def __init__(self, path: epath.Path, resume_step: int):
        self._path = path
        if path.exists():
            _keep_lines(path, resume_step)

    def write(self, line: dict) -> None:
        text = json.dumps(line) + "\n"
        with writing(self._path):
            if str(self._path).startswith("gs://"):  # object stores cannot append
                before = self._path.read_text() if self._path.exists() else ""
                self._path.write_text(before + text)
            else:
                with open(self._path, "a") as file:
                    file.write(text)


class RunLogger:
    """Sends each line of metrics to every destination in the config. Only process 0 should create one."""

    def __init__(self, workdir: epath.Path, config: LogConfig, *, name: str, total_steps: int, resume_step: int):
        self._total_steps = total_steps
        self._file = MetricsFile(workdir / "metrics.jsonl", resume_step)
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            # max_queue=0: a bounded queue blocks this process for ever once the writer's thread has failed
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1, max_queue=0)
        if config.wandb:
            self._wandb = start_wandb(workdir, name)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total_steps, initial=resume_step, unit="update", dynamic_ncols=True)

    def metrics(self, step: int, scalars: dict[str, float | list]) -> None:
        """Writes one line. Lists (load per expert) are written whole to the file and entry by entry elsewhere."""
        self._file.write({"step": step, **scalars})
        flat = dict(_flatten(scalars))
        if self._tensorboard and not self._tensorboard.file_writer.event_writer._worker.is_alive():
            self._tensorboard = None
            say("TensorBoard's event files cannot be written any more; metrics.jsonl goes on")
        if self._tensorboard:
            for key, value in flat.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(flat, step=step)
        speed = scalars["images_per_second"]
        loss = "not finite" if scalars["loss"] is None else f"{scalars['loss']:.4f}"
        shown = f"loss {loss}, {speed:.0f} images/s, waiting for data {scalars['data_wait_share']:.0%}"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(shown)
        else:
            seconds = (self._total_steps - step) * scalars["seconds"] / max(1, scalars["updates"])
            left = datetime.timedelta(seconds=round(seconds))
            say(f"update {step}/{self._total_steps}: {shown}, {left} left")

    def image(self, step: int, name: str, image_hwc) -> None:
        if self._tensorboard:
            self._tensorboard.add_image(name, image_hwc, step, dataformats="HWC")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard:
            with contextlib.suppress(OSError):  # they are a copy of metrics.jsonl
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def say(message: str) -> None:
    """Prints one line to stderr without breaking the progress bar."""
    tqdm.tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def start_wandb(workdir, name: str):
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb: the package wandb is not installed; pip install wandb, or turn it off") from None
    return wandb.init(project="trm_diffusion", name=name, dir=str(workdir), id=name, resume="allow")


def _flatten(scalars: dict):
    """Yields (name, number) of every entry, except for None, the mean over nothing."""
    for key, value in scalars.items():
        if isinstance(value, list):
            yield from _flatten({f"{key}/{index}": entry for index, entry in enumerate(value)})
        elif value is not None:
            yield key, value


def _keep_lines(path: epath.Path, most: int) -> None:
    """Rewrites a file of metrics, line by line, without those past the update `most` and without damaged ones."""
    damaged = []
    with path.open("rb") as lines, replacing(path) as partial, partial.open("wb") as kept:
        for number, line in enumerate(lines, 1):
            step = _step_of(line)
            if step is None:
                damaged.append(number)
            elif step <= most:
                kept.write(line.removesuffix(b"\n") + b"\n")
    if damaged:
        lines = f"{len(damaged):,} damaged lines" if damaged[1:] else "a damaged line"
        say(f"{path}: dropped {lines}{', the first' if damaged[1:] else ''} at line {damaged[0]:,}")


def _step_of(line: bytes) -> int | None:
    """The update number of a line; None for a damaged one, such as the last line before a crash."""
    if match := _LINE.fullmatch(line):  # several times faster than parsing, for files of a million lines
        return int(match[1])
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return step if type(step) is int else None
