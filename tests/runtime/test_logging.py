"""The metrics file is cut back to the checkpoint, and every line reaches every destination in the config."""

import errno
import json
import sys
import tracemalloc

import pytest
from etils import epath

from tests.full_disk import full_disk
from trm_diffusion.errors import UserError
from trm_diffusion.runtime.logging import LogConfig, MetricsFile, RunLogger

LINE = {
    "updates": 2,
    "loss": 0.5,
    "loss_quarter_1": None,
    "expert_load": [0.25, 0.75],
    "images_per_second": 100.0,
    "data_wait_share": 0.25,
    "seconds": 4.0,
}


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("resume_step", "kept"), [(0, []), (3, [2]), (4, [2, 4]), (99, [2, 4, 6])])
def test_lines_past_the_checkpoint_are_dropped(tmp_path, resume_step, kept):
    path = epath.Path(tmp_path / "metrics.jsonl")
    first = MetricsFile(path, 0)
    for step in (2, 4, 6):
        first.write({"step": step, "loss": 1.0 / step})
    before = path.read_text().splitlines()
    resumed = MetricsFile(path, resume_step)
    assert steps_in(path) == kept
    assert path.read_text().splitlines() == before[: len(kept)]  # the remaining lines are unchanged
    resumed.write({"step": 100})
    assert steps_in(path) == [*kept, 100]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step"', "4", '{"loss": 1.0}', "null"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text('{"step": 2}\n' + torn)
    MetricsFile(path, 8).write({"step": 6})
    assert steps_in(path) == [2, 6]


@pytest.mark.parametrize("damaged", [
    b'{"step": 3, "lo{"step": 4, "loss": 0.5}', b"\0" * 40, b'{"step": 3, "loss": 0.\xb5}', b"[" * 100_000, b"",
    b'{"step": ' + b"9" * 5000 + b"}", b'{"step": "3"}', b'{"step": true}', b"[3]",
])  # fmt: skip
def test_damaged_lines_are_dropped_and_told(tmp_path, capsys, damaged):
    path = epath.Path(tmp_path / "metrics.jsonl")
    good = [b'{"step": 2, "loss": 0.5, "expert_load": [0.25, 0.75]}', '{"loss": "é", "step": 6}'.encode()]
    path.write_bytes(b"\n".join([good[0], damaged, damaged, good[1], b'{"step": 8}']) + b"\n")
    MetricsFile(path, 6)
    assert path.read_bytes() == b"\n".join(good) + b"\n"
    assert capsys.readouterr().err == f"{path}: dropped 2 damaged lines, the first at line 2\n"
    MetricsFile(path, 6)
    assert path.read_bytes() == b"\n".join(good) + b"\n" and not capsys.readouterr().err


def test_a_long_file_is_never_held_in_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, **LINE, "note": "x" * 2000}) + "\n"
    path.write_text(line * 10_000)
    tracemalloc.start()
    MetricsFile(epath.Path(path), 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.read_bytes() == b"" and most < 2**20


@pytest.mark.parametrize(("total", "left"), [(10, "0:00:16"), (100_002, "2 days, 7:33:20")])
def test_a_line_goes_to_the_file_and_to_the_terminal_in_plain_text(tmp_path, capsys, total, left):
    workdir = epath.Path(tmp_path)
    logger = RunLogger(workdir, LogConfig(tensorboard=False), name="run", total_steps=total, resume_step=0)
    logger.metrics(2, LINE)
    logger.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"step": 2, **LINE}]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"update 2/{total}: loss 0.5000, 100 images/s, waiting for data 25%, {left} left\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_without_a_finite_update_is_shown_too(tmp_path, capsys):
    logger = RunLogger(epath.Path(tmp_path), LogConfig(), name="run", total_steps=10, resume_step=0)
    logger.metrics(2, LINE | {"loss": None})
    logger.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert capsys.readouterr().err.startswith("update 2/10: loss not finite, ")


def test_tensorboard_holds_every_number_by_name(tmp_path):
    logger = RunLogger(epath.Path(tmp_path), LogConfig(), name="run", total_steps=10, resume_step=0)
    logger.metrics(2, LINE)
    logger.close()
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents*")
    content = events.read_bytes()
    for name in (b"updates", b"expert_load/0", b"expert_load/1", b"images_per_second"):
        assert name in content
    assert b"loss_quarter_1" not in content  # a mean over nothing


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = LogConfig(tensorboard=False, wandb=True)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        RunLogger(epath.Path(tmp_path), config, name="run", total_steps=10, resume_step=0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_training_goes_on_when_tensorboard_cannot_write(tmp_path, monkeypatch, capsys):
    """Its thread ends with the error; a queue that nobody empties must not block."""
    logger = RunLogger(epath.Path(tmp_path), LogConfig(), name="x", total_steps=99, resume_step=0)
    writer = logger._tensorboard.file_writer.event_writer

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for method in ("write_event", "flush", "close"):
        monkeypatch.setattr(writer._ev_writer, method, full)
    for step in range(1, 100):
        logger.metrics(step, LINE)
    writer._worker.join(60)
    logger.metrics(100, LINE)
    logger.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [*range(1, 101)]
    assert capsys.readouterr().err.count("TensorBoard's event files cannot be written any more") == 1


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    metrics = MetricsFile(path, 0)
    with full_disk(), pytest.raises(UserError, match=f"{path} cannot be written .File too large.: free some space"):
        metrics.write(LINE)
