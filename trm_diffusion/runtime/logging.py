"""Logging of metrics to metrics.jsonl, TensorBoard, Weights & Biases (on request), and the terminal.

metrics.jsonl is the authoritative record. A resumed run first drops the lines past its checkpoint, so that the file
equals that of an uninterrupted run, except for the wall-clock fields.
"""

import dataclasses
import datetime
import json
import sys

import tqdm
from etils import epath

from trm_diffusion.errors import UserError
from trm_diffusion.files import write_text
from trm_diffusion.models.settings import Settings, setting

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
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            write_text(path, "".join(line + "\n" for line in kept))

    def write(self, line: dict) -> None:
        text = json.dumps(line) + "\n"
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

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        if config.wandb:
            self._wandb = start_wandb(workdir, name)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total_steps, initial=resume_step, unit="update", dynamic_ncols=True)

    def metrics(self, step: int, scalars: dict[str, float | list]) -> None:
        """Writes one line. Lists (load per expert) are written whole to the file and entry by entry elsewhere."""
        self._file.write({"step": step, **scalars})
        flat = dict(_flatten(scalars))
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


def _step_of(line: str) -> float:
    """The update number of a line; infinity for a line that a crash cut off, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
