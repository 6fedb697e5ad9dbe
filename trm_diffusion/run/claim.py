"""One owner: a job claims the directory that it writes, so that two starts cannot write into one another's files.

A claim is a small file, `.claim`, in that directory; it says who holds it. The second job is told so and ends. A dead
holder's claim is taken over, so a killed job goes on when the same command is started again. Jobs that only read a run
need no claim.

How sure this is:

- *One machine, local disk*: certain. A claim is looked at and written in one step under a lock of the file system, and
  the holder is alive if a process has its number and its start time.
- *Several machines, shared file system* (NFS, Lustre): the holder counts beats in its claim. Whoever finds a claim of
  another machine waits until the count moves, at most `BEAT_SECONDS`, and ends; if it stands still for
  `PATIENCE_SECONDS`, the holder is taken for dead. Clocks are not compared. If the file system's locks reach every
  machine (NFS 4, Lustre with flock), one of two starts at the same moment wins.
- *Buckets, and file systems whose locks do not reach other machines*: two starts at the same moment may both begin;
  the one that wrote its claim last goes on, and the other finds that at its next beat and ends.

A holder that finds another's claim in place of its own, because it was suspended or cut off from its storage for longer
than `PATIENCE_SECONDS`, ends at once with exit code 2. Until that beat both may write.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from trm_diffusion.errors import EXIT_USER_ERROR, Interrupted, UserError
from trm_diffusion.files import clear_partial, writing
from trm_diffusion.machine import machine, started
from trm_diffusion.runtime.logging import say
from trm_diffusion.runtime.processes import in_process_0
from trm_diffusion.runtime.signals import StopRequest

CLAIM = ".claim"
FIELDS = {"token", "host", "machine", "pid", "started", "job", "since", "beats"}
BEAT_SECONDS = 5
PATIENCE_SECONDS = 60  # NFS clients may show for as long what a file held before
POLL_SECONDS = 0.5


@contextlib.contextmanager
def claimed(
    directory: os.PathLike | str, job: str, stop: StopRequest, share: tuple[int, int] | None = None
) -> Iterator[None]:
    """Holds `directory` for the block; makes it if needed, and clears what killed jobs left half-written in it.

    Process 0 of a run holds it for all; all must call this at the same point.

    Args:
      job: what the holder does, as others are told, such as "training".
      share: (index, count) of this process among those that fill the directory together, each with a claim of its own.

    Raises:
      UserError: another job holds it, or it cannot be written.
      Interrupted: asked to stop while waiting for a sign of life of a holder on another machine.
    """
    claim = Claim(directory, job, share or (0, 1))
    if share is None:
        in_process_0(lambda: claim.take(stop))
    else:
        claim.take(stop)
    try:
        yield
    finally:
        claim.release()


class Claim:
    """The claim of this process on a directory; `share` as in `claimed`."""

    def __init__(self, directory: os.PathLike | str, job: str, share: tuple[int, int] = (0, 1)):
        index, count = share
        self.directory = epath.Path(directory)
        self._job = job
        self._shares = f"-of-{count}" if count > 1 else ""
        self._path = self.directory / (f"{CLAIM}-{index}{self._shares}" if self._shares else CLAIM)
        self._record: dict = {}  # ours, while we hold it
        self._made = False  # the directory is new
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def take(self, stop: StopRequest) -> None:
        """Holds the directory from now on. Raises as `claimed` does."""
        with writing(self.directory):
            self._made = not self.directory.exists()
            try:
                self._replace_the_dead(stop)
                self._heart.start()
                self._refuse_other_shares(stop)
                if not (self._shares or _in_bucket(self._path)):
                    clear_partial(self.directory)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Gives the directory up, and removes it if it is new and empty. Does nothing if it is not held."""
        if not self._record:
            return
        self._end.set()
        if self._heart.is_alive():
            self._heart.join()
        with contextlib.suppress(OSError):
            with _locked(self._path) as file:
                if _read(self._path, file).get("token", self._record["token"]) == self._record["token"]:
                    self._path.unlink()
            if self._made and not any(self.directory.iterdir()):
                self.directory.rmdir()
        self._record = {}

    def _replace_the_dead(self, stop: StopRequest) -> None:
        """Writes the claim. Raises UserError if a living holder's is there."""
        silent: dict = {}  # the claim of a holder on another machine that gave no sign of life
        while True:
            with _locked(self._path, make=True) as file:
                found = _read(self._path, file)
                if not found or _dead(found) or found == silent:
                    self._record = _new_record(self._job)
                    _write(self._path, file, self._record)
                    break
            if found["machine"] == machine():
                raise self._held_by(found)
            silent = self._listen(self._path, found, stop)
        if found:
            say(f"{self.directory}: the claim of {_described(found)} is taken over, since that job has ended")

    def _listen(self, path: epath.Path, found: dict, stop: StopRequest) -> dict:
        """Waits for a sign of life of a holder on another machine, and raises UserError if there is one.

        Returns its claim if it stayed silent, {} if it has released it.
        """
        say(f"{self.directory} is claimed by {_described(found)}: up to {PATIENCE_SECONDS} s to see if that job lives")
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if stop.requested:
                raise Interrupted(f"stopped before the job had claimed {self.directory}")
            time.sleep(POLL_SECONDS)
            now = _read(path)
            if now.get("token") != found["token"]:
                return {}
            if now != found:
                raise self._held_by(found)
        return found

    def _refuse_other_shares(self, stop: StopRequest) -> None:
        """Removes the claims of dead jobs that filled the directory in another number of shares.

        Raises UserError if one of them lives.
        """
        for path in self.directory.glob(f"{CLAIM}*"):
            if path.name == self._path.name or (self._shares and path.name.endswith(self._shares)):
                continue
            found = _read(path)
            if found and not _dead(found):
                if found["machine"] == machine():
                    raise self._held_by(found)
                self._listen(path, found, stop)
            with _locked(path) as file:
                if _read(path, file) in ({}, found):
                    path.unlink()

    def _held_by(self, found: dict) -> UserError:
        return UserError(
            f"{self.directory} is in use: {_described(found)}. Wait until that job ends, or stop it, or give another "
            "directory"
        )

    def _beat(self) -> None:
        """Counts beats in the claim until it is released. Ends the process if the claim is another's by then."""
        while not self._end.wait(BEAT_SECONDS):
            found = {}
            with contextlib.suppress(OSError), _locked(self._path) as file:  # OSError: storage is full or out of reach
                found = _read(self._path, file)
                if not found or found["token"] == self._record["token"]:
                    self._record["beats"] += 1
                    _write(self._path, file, self._record)
                    found = {}
            if found:
                os.write(2, f"error: {self.directory} was taken over: {_described(found)}; this job ends\n".encode())
                os._exit(EXIT_USER_ERROR)


def _new_record(job: str) -> dict:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "job": job,
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "beats": 0,
    }


def _described(found: dict) -> str:
    return f"{found['job']} by process {found['pid']} on {found['host']}, since {found['since']}"


def _dead(found: dict) -> bool:
    """Whether the holder is certainly dead: a process of this machine that is gone."""
    return found["machine"] == machine() and started(found["pid"]) != found["started"]


def _in_bucket(path: epath.Path) -> bool:
    return "://" in str(path)


def _read(path: epath.Path, file: BinaryIO | None = None) -> dict:
    """The claim in a file, from `file` if it is open; {} if there is none, or its writer died while writing it."""
    try:
        if file is None and not path.exists():
            return {}
        found = json.loads(path.read_bytes() if file is None else file.read())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= FIELDS else {}


def _write(path: epath.Path, file: BinaryIO | None, record: dict) -> None:
    data = json.dumps(record).encode()
    if file is None:
        path.write_bytes(data)
        return
    file.seek(0)  # in place, so that nobody finds it empty
    file.write(data)
    file.truncate()
    file.flush()


@contextlib.contextmanager
def _locked(path: epath.Path, *, make: bool = False) -> Iterator[BinaryIO | None]:
    """Opens a claim's file and holds its lock; None in a bucket. make: makes the directory too."""
    if _in_bucket(path):
        yield None
        return
    while True:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            if make:  # another job has released and removed the new directory
                continue
            raise
        with open(descriptor, "r+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, descriptor):  # else its holder has released and removed it
                yield file
                return


def _is_at(path: epath.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
