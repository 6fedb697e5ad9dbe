"""Where numbers go: metrics.jsonl, TensorBoard, Weights & Biases on request, and the terminal.

metrics.jsonl is the record. A resumed run first drops the lines past its checkpoint, so that the file equals that of a
run that was never interrupted, but for the fields that tell wall-clock time.
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
    every: int = setting(50, least=1)  # updates per line of metrics, each the mean over them
    tensorboard: bool = True  # write TensorBoard event files into the workdir
    wandb: bool = False  # also log to Weights & Biases (package wandb, project trm_diffusion)
    samples_every: int = setting(1000, least=0)  # updates between sample grids; 0 draws none


class MetricsFile:
    """metrics.jsonl of a run: one JSON object a line, led by its update number as `step`."""

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
    """Sends each line of metrics to every place that the config names. Only process 0 should hold one."""

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
        """Writes one line. Lists (load per expert) go to the file whole and elsewhere entry by entry."""
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
    """One line to the person at the terminal, past a progress bar if there is one."""
    tqdm.tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def start_wandb(workdir, name: str):
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb: the package wandb is not installed; pip install wandb, or leave it off") from None
    return wandb.init(project="trm_diffusion", name=name, dir=str(workdir), id=name, resume="allow")


def _flatten(scalars: dict):
    """(name, number) of every entry that has one; a mean over nothing is None and has not."""
    for key, value in scalars.items():
        if isinstance(value, list):
            yield from _flatten({f"{key}/{index}": entry for index, entry in enumerate(value)})
        elif value is not None:
            yield key, value


def _step_of(line: str) -> float:
    """The update number of a line; a line torn by a crash belongs to no update that was saved."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
