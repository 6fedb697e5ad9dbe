"""The roll call: all processes connect, or the missing ones are named to all others; contradictions are refused."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from tests.jobs.tiny import ROOT, all_finished
from trm_diffusion.errors import Interrupted, UserError
from trm_diffusion.runtime import processes
from trm_diffusion.runtime.processes import compiled_together, join


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def roll_call(port: int, count: int, came: dict[int, int], seconds: float = 5.0) -> dict[int, object]:
    """What each connected process is told: the missing ones, or the error. came: process -> its --process_count."""
    told, deadline = {}, time.monotonic() + seconds

    def take_part(index, its_count):
        try:
            if index == 0:
                told[index] = processes._call_roll(port, count, deadline)
            else:
                told[index] = processes._answer_roll_call(("localhost", port), its_count, abs(index), deadline)
        except UserError as error:
            told[index] = str(error)

    threads = [threading.Thread(target=take_part, args=item) for item in came.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 30)
    return told


def test_all_come(port):
    assert roll_call(port, 4, dict.fromkeys(range(4), 4), seconds=30) == dict.fromkeys(range(4), [])
    assert roll_call(port, 2, {0: 2, 1: 2}, seconds=30) == {0: [], 1: []}  # the port is free again at once


def test_the_missing_are_named_to_all_that_came(port):
    assert roll_call(port, 4, {0: 4, 2: 4}) == {0: [1, 3], 2: [1, 3]}
    assert roll_call(port, 4, {1: 4, 2: 4}) == {1: [0], 2: [0]}


@pytest.mark.parametrize(("came", "says"), [
    ({0: 3, 1: 4}, "process 1 was started with --process_count=4, process 0 with 3"),
    ({0: 3, 1: 3, -1: 3}, "two processes were started with --process_index=1"),  # -1 connects as 1
])  # fmt: skip
def test_what_contradicts_is_refused(port, came, says):
    told = roll_call(port, came[0], came, seconds=30 if len(came) == 2 else 10)
    assert told[0] == says and says in [told[index] for index in came if index]


def test_strangers_and_those_who_leave_again_do_not_count(port):
    def disturb():
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1, "count": 3}\n'):
            try:
                with socket.create_connection(("localhost", port), timeout=5) as connection:
                    connection.sendall(words)
            except OSError:
                pass

    threading.Timer(0.2, disturb).start()
    assert roll_call(port, 3, {0: 3}) == {0: [1, 2]}


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)  # would raise
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    join("", None, None, detect=True, timeout=1)
    join("localhost:1", 1, 0, detect=True, timeout=1)
    join("", 2, 1, detect=False, timeout=1)  # two processes that share a prepare
    assert not processes.is_distributed() and processes.is_main_process()


def test_slurm_tells_what_is_not_given(monkeypatch):
    variables = dict(JOB_ID=5, STEP_NODELIST="node[007-015],other", NTASKS=16, PROCID=3, LOCALID=0)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert processes._detected("", None, None, timeout=1) == ("node007:61445", 16, 3)
    assert processes._detected("head:1", None, None, timeout=1) == ("head:1", 16, 3)


@pytest.mark.parametrize(("arguments", "says"), [
    (("host", 2, 0), "must be HOST:PORT"),
    (("host:x", 2, 0), "must be HOST:PORT"),
    (("host:1", 2, None), "needs --process_count and --process_index"),
    (("host:1", 2, 2), "--process_index=2 must be at least 0 and less than --process_count=2"),
])  # fmt: skip
def test_mistakes_are_refused(arguments, says):
    with pytest.raises(UserError, match=says):
        join(*arguments, detect=False, timeout=1)


def test_a_missing_process_is_named_in_time(port):
    before = time.monotonic()
    with pytest.raises(Interrupted, match=f"processes 1, 2 of 3 did not connect to localhost:{port} within 1 s"):
        join(f"localhost:{port}", 3, 0, detect=False, timeout=1)
    assert 1 <= time.monotonic() - before < 10


class Program:
    """Stands in for a jitted function: process 1 compiles slowly, and a call tells who had compiled when it began."""

    def __init__(self, directory: Path, index: int):
        self._directory, self._index = directory, index

    def lower(self):
        return self

    def compile(self):
        time.sleep(2 * self._index)
        (self._directory / str(self._index)).touch()

    def __call__(self) -> list[str]:
        return sorted(path.name for path in self._directory.iterdir())


def test_a_program_starts_once_all_processes_have_compiled_it(port, tmp_path):
    code = (
        "import sys; from pathlib import Path; from trm_diffusion.runtime.processes import compiled_together, join\n"
        "from tests.runtime.test_processes import Program\n"
        "index, port, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])\n"
        "join(f'localhost:{port}', 2, index, detect=False, timeout=300)\n"
        "program = compiled_together(Program(directory, index))\n"
        "print(program(), program())\n"
    )
    arguments = [[sys.executable, "-c", code, str(index), str(port), str(tmp_path)] for index in (0, 1)]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(one, **options) for one in arguments]
    assert [out for out, _ in all_finished(both)] == ["['0', '1'] ['0', '1']\n"] * 2


def test_one_process_compiles_as_always():
    jitted = jax.jit(lambda x: x + 1)
    assert compiled_together(jitted) is jitted
