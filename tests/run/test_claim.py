"""A directory has one owner: a second job is refused and told who holds it; a dead owner's claim is taken over."""

import json
import os
import signal
import time

import pytest
from etils import epath

from trm_diffusion.errors import EXIT_USER_ERROR, Interrupted, UserError
from trm_diffusion.files import partial_path
from trm_diffusion.machine import machine, started
from trm_diffusion.run import claim
from trm_diffusion.run.claim import CLAIM, Claim, claimed
from trm_diffusion.runtime.signals import StopRequest


def in_fork(act) -> int:
    """The process id of a fork that runs `act` and exits with 0, with 2 after a UserError, else with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    except UserError:
        code = EXIT_USER_ERROR
    finally:
        os._exit(code)


def ends_with(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_holding(directory, share=(0, 1)) -> None:
    """A job claims the directory and is killed."""

    def job():
        Claim(directory, "--mode=train", share).take(StopRequest())
        os.kill(os.getpid(), signal.SIGKILL)

    assert ends_with(in_fork(job)) == -signal.SIGKILL


def put_claim(directory, **changes) -> dict:
    """The claim of a job on another machine."""
    record = claim._new_record("--mode=train") | {"host": "elsewhere", "machine": "another"} | changes
    directory.mkdir(exist_ok=True)
    (directory / CLAIM).write_text(json.dumps(record))
    return record


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_a_second_job_is_told_who_holds_the_directory_and_changes_nothing(run):
    with claimed(run, "--mode=train", StopRequest()):
        before = (run / CLAIM).read_bytes()
        with pytest.raises(UserError) as error, claimed(run, "--mode=prepare", StopRequest()):
            pass
        assert (run / CLAIM).read_bytes() == before
    since = json.loads(before)["since"]
    assert f"{run} is in use: --mode=train by process {os.getpid()} on {os.uname().nodename}, since {since}" in str(
        error.value
    )
    assert not run.exists()  # new and empty, so it is gone with the claim


def test_a_directory_with_files_stays_and_its_claim_goes(run):
    with claimed(run, "--mode=train", StopRequest()):
        (run / "config.json").write_text("{}")
    assert [path.name for path in run.iterdir()] == ["config.json"]


@pytest.mark.parametrize("left", ["", '{"torn', "[]", "null"])
def test_what_a_dead_holder_left_is_taken_over_at_once(run, capsys, left):
    die_holding(run)
    assert (run / CLAIM).exists()
    if left:
        (run / CLAIM).write_text(left)
    with claimed(run, "--mode=train", StopRequest()):
        assert json.loads((run / CLAIM).read_text())["pid"] == os.getpid()
    assert left or "is taken over, since that job has ended" in capsys.readouterr().err
    assert not (run / CLAIM).exists()


def test_a_process_id_that_is_used_again_is_not_the_holder(run):
    put_claim(run, machine=machine(), started=started(os.getpid()) - 1)
    with claimed(run, "--mode=train", StopRequest()):
        pass


@pytest.mark.parametrize("stale", [False, True], ids=["free", "left by a dead job"])
def test_of_starts_at_the_same_moment_exactly_one_wins(tmp_path, stale):
    for attempt in range(10):
        run = tmp_path / str(attempt)
        if stale:
            die_holding(run)
        moment = time.time() + 0.05
        reader, writer = os.pipe()

        def job(run=run, moment=moment, reader=reader, writer=writer):
            os.close(writer)
            while time.time() < moment:
                pass
            with claimed(run, "--mode=train", StopRequest()):
                os.read(reader, 1)  # until the test closes the pipe, once the others have ended

        children = [in_fork(job) for _ in range(6)]
        os.close(reader)
        codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in children[1:]]
        os.close(writer)
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
        assert codes == [EXIT_USER_ERROR] * 5 + [0]
        assert not (run / CLAIM).exists()


class TestAnotherMachine:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.5)
        monkeypatch.setattr(claim, "POLL_SECONDS", 0.01)

    def test_a_silent_holder_is_taken_for_dead(self, run):
        put_claim(run)
        with claimed(run, "--mode=train", StopRequest()):
            assert json.loads((run / CLAIM).read_text())["machine"] == machine()

    def test_a_holder_that_gives_a_sign_of_life_is_not(self, run, monkeypatch):
        record = put_claim(run)
        monkeypatch.setattr(claim.time, "sleep", lambda _: put_claim(run, **record | {"beats": 1}))
        with pytest.raises(UserError, match="is in use: --mode=train by process .* on elsewhere"):
            Claim(run, "--mode=train").take(StopRequest())

    def test_a_holder_that_ends_meanwhile_is_replaced(self, run, monkeypatch):
        put_claim(run)
        monkeypatch.setattr(claim.time, "sleep", lambda _: (run / CLAIM).unlink())
        with claimed(run, "--mode=train", StopRequest()):
            pass

    def test_waiting_ends_on_request(self, run):
        put_claim(run)
        stop = StopRequest()
        stop.requested = True
        with pytest.raises(Interrupted):
            Claim(run, "--mode=train").take(stop)


def test_a_holder_beats_and_ends_when_its_claim_is_anothers(run, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)

    def job():
        with claimed(run, "--mode=train", StopRequest()):
            time.sleep(600)

    child = in_fork(job)
    while not (run / CLAIM).exists() or claim._read(epath.Path(run / CLAIM)).get("beats", 0) < 2:
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    put_claim(run)
    os.kill(child, signal.SIGCONT)
    assert ends_with(child) == EXIT_USER_ERROR
    assert json.loads((run / CLAIM).read_text())["machine"] == "another"


def test_in_a_bucket_the_later_of_two_writers_goes_on(run, monkeypatch):
    monkeypatch.setattr(claim, "_in_bucket", lambda path: True)
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)
    run.mkdir()

    def job():
        with claimed(run, "--mode=train", StopRequest()):
            put_claim(run)  # of one that started at the same moment
            time.sleep(600)

    assert ends_with(in_fork(job)) == EXIT_USER_ERROR
    assert json.loads((run / CLAIM).read_text())["machine"] == "another"


def test_shares_of_one_directory_are_held_apart(run):
    with claimed(run, "--mode=prepare", StopRequest(), (0, 2)), claimed(run, "--mode=prepare", StopRequest(), (1, 2)):
        for share in ((0, 2), (1, 2), (2, 3), (0, 1)):  # the same share, and the same work shared in another way
            with pytest.raises(UserError, match="is in use"):
                Claim(run, "--mode=prepare", share).take(StopRequest())
        assert sorted(path.name for path in run.iterdir()) == [f"{CLAIM}-0-of-2", f"{CLAIM}-1-of-2"]
    die_holding(run, (1, 3))
    (run / "shard").write_text("")
    with claimed(run, "--mode=prepare", StopRequest()):
        assert sorted(path.name for path in run.iterdir()) == [CLAIM, "shard"]


def test_what_killed_jobs_left_half_written_is_cleared(run):
    def job():
        for name in ("config.json", "samples/grid.png"):
            partial = partial_path(run / name)
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("half")

    assert ends_with(in_fork(job)) == 0
    written = run / f".evaluation.json.partial-{machine()}-{os.getppid()}"  # by a reader of this run, which lives
    elsewhere = run / ".analysis.json.partial-another-1"
    old = run / ".metrics.jsonl.partial-another-1"
    for path in (written, elsewhere, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    with claimed(run, "--mode=train", StopRequest()):
        left = {path for path in run.rglob("*") if path.is_file()}
    assert left == {written, elsewhere, run / CLAIM}


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"{path} cannot be written .*a file is where a folder should be"):
            Claim(path, "--mode=train").take(StopRequest())
    assert (tmp_path / "file").read_text() == ""
