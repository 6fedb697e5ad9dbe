"""The command line ends in one line and the right exit code, also where a library wraps the user's mistake."""

import contextlib
import errno
import os
import pathlib
import signal
import sys
import time

import pytest

from tests.commands import ran
from tests.full_disk import full_disk
from tests.jobs.tiny import command, finished, tiny_config
from trm_diffusion.config import to_dict
from trm_diffusion.errors import Interrupted, UserError, told
from trm_diffusion.files import check_writable, write_json


def wrapped(cause: BaseException, *wrappers: str) -> Exception:
    """An error that a library raises because of another one."""
    error: BaseException = cause
    for how in wrappers:
        try:
            if how == "group":
                raise ExceptionGroup("several", [ValueError("another"), error])
            try:
                raise error
            except BaseException as inner:
                if how == "cause":
                    raise RuntimeError("the library's own words") from inner
                raise RuntimeError("the library's own words")  # noqa: B904  a context, as a library leaves it
        except Exception as outer:
            error = outer
    return error


@pytest.mark.parametrize("wrappers", [(), ("cause",), ("context",), ("cause", "context", "cause"), ("group", "cause")])
@pytest.mark.parametrize("kind", [UserError, Interrupted])
def test_what_a_library_wraps_is_told(kind, wrappers):
    cause = kind("one line")
    assert told(wrapped(cause, *wrappers)) is cause


def test_errors_of_files_are_told_with_their_path_and_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        (tmp_path / "file" / "x").read_text()
    line = str(told(wrapped(error.value, "cause")))
    assert line.startswith(f"{tmp_path}/file/x: Not a directory: a file is where a folder should be")
    full = str(told(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert "No space left on device" in full and "free some space" in full
    library = ValueError("""Failed writing: "/run/2/d/f": Failed to write: No space left [os_error_code='28']""")
    assert "(No space left on device: /run/2/d/f)" in str(told(library))


def test_a_fault_of_the_program_is_not_told_as_the_users():
    for error in (ValueError("x"), KeyError(1), OSError("no number"), ConnectionRefusedError(errno.ECONNREFUSED, "x")):
        assert told(wrapped(error, "cause")) is None
    missing = FileNotFoundError(errno.ENOENT, "No such file", "/tried/by/a/library")
    assert told(wrapped(missing, "cause")) is not None and told(wrapped(missing, "context")) is None
    try:
        raise ValueError from None  # what was raised before it is left out on purpose
    except ValueError as error:
        error.__context__ = UserError("x")
        assert told(error) is None


def test_output_is_tried_without_leaving_anything(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder" / "a.json")
    for path, reason in (
        (tmp_path / "file" / "a.json", "a file is where a folder"),
        (tmp_path, "a folder is in its pl"),
    ):
        with pytest.raises(UserError, match=f"{path} cannot be written .*{reason}"):
            check_writable(path)
    with full_disk(), pytest.raises(UserError, match="a.json cannot be written .File too large.: free some space"):
        check_writable(tmp_path / "a.json")
    with full_disk(), pytest.raises(UserError, match="a.json cannot be written .File too large.: free some space"):
        write_json(tmp_path / "a.json", {"long": "x" * 1000})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def flags(tmp_path):
    settings = to_dict(tiny_config(train__updates=2, evaluate__kind="none"))
    (tmp_path / "tiny.py").write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({settings!r})\n"
    )
    return f"--config={tmp_path / 'tiny.py'} --compilation_cache=none"


def test_a_mistake_is_one_line(flags, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "out.npz").mkdir()
    train = f"python -m trm_diffusion.main {flags} --workdir={tmp_path}/run"
    mistakes = {
        f"{train} --config.seed=5": "belongs to seed=0, this run has seed=5",
        f"{train} --config.data.source=synthetic": "the data have 4096 records, and 1438 when the run in",
        f"{train} --config.model.width=32": "holds a run with config.model.width = 16, not 32",
        f"{train} --workdir={tmp_path}/file": f"{tmp_path}/file cannot be written",
        f"{train} --workdir={tmp_path}/file/run": f"{tmp_path}/file/run cannot be written",
        f"{train} --mode=sample --num=1 --out={tmp_path}/out.npz": f"{tmp_path}/out.npz cannot be written",
        f"{train} --mode=sample --num=1 --out={tmp_path}/file": f"{tmp_path}/file cannot be written",
    }
    (code, text), *outcomes = ran([train, *mistakes])
    assert code == 0, text
    for (line, says), (code, text) in zip(mistakes.items(), outcomes, strict=True):
        lines = text.splitlines()[:-1]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], (line, text)
    assert (tmp_path / "file").read_text() == "" and not list((tmp_path / "out.npz").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_while_it_imports(number):
    process = command("--config=configs/digits.py", "--mode=doctor")
    while not handles(process.pid, signal.SIGTERM):  # it handles SIGINT by then
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    out, err = finished(process, code=75)
    assert err.startswith("stopped before ") and err.count("\n") == 1 and not out


def handles(pid: int, number: int) -> bool:
    """Whether the Python program of this process has a handler for the signal."""
    with contextlib.suppress(FileNotFoundError):
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        running = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().startswith(sys.executable.encode())
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return running and bool(int(caught, 16) >> (number - 1) & 1)
    return False
