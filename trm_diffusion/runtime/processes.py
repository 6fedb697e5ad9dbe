"""Several processes as one run: how they find each other, who is missing, and how they end.

JAX waits for processes that do not come until it aborts, naming none of them. So a run begins with a roll call at the
coordinator's address, and JAX takes the same port over once all are there.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import time
import warnings

import jax
from jax._src.clusters import ClusterEnv  # JAX offers what it detects in no public place
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from trm_diffusion.errors import Interrupted, UserError

RETRY_SECONDS = 0.2  # between attempts to reach process 0
VERDICT_SECONDS = 1  # a process that came stays so long past the deadline, to hear who is missing and not be missed
HELLO_BYTES = 1024  # at most, of what a process says when it comes
LAST_WORD_SECONDS = 10  # an error in one process waits so long for the same error in the others
END_SECONDS = 7 * 24 * 3600  # processes that are done wait for those at work; JAX's heartbeats tell of the dead


def join(coordinator: str, count: int | None, index: int | None, *, detect: bool, timeout: int) -> None:
    """Makes this process one of the run's; does nothing where neither the arguments nor a cluster speak of others.

    To be called before anything touches a device.

    Args:
      coordinator: HOST:PORT of process 0; "" is JAX_COORDINATOR_ADDRESS of the environment, or the cluster's.
      count, index: how many processes there are, and which this is; None is the cluster's.
      detect: ask the clusters that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes) for what is not given.
      timeout: seconds in which all must have come.

    Raises:
      UserError: arguments that do not fit together, or do not fit the other processes'.
      Interrupted: some did not come in time; the message names them.
    """
    deadline = time.monotonic() + timeout
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if detect and (not coordinator or None in (count, index)):
        coordinator, count, index = _detected(coordinator, count, index, timeout)
    if not coordinator or count == 1:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, where process 0 runs and a port free there")
    if count is None or index is None:
        raise UserError(f"--coordinator={coordinator} needs --process_count and --process_index")
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} must be from 0 to --process_count={count} less 1")
    if index == 0:
        missing = _call_roll(int(port), count, deadline)
    else:
        missing = _answer_roll_call((host.strip("[]"), int(port)), count, index, deadline)
    if missing:
        named = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        raise Interrupted(f"{named} of 0 to {count - 1} did not come to {coordinator} within {timeout} s")
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        cluster_detection_method=None if detect else "deactivate",  # it may know which devices are this process's
        initialization_timeout=timeout,
        shutdown_timeout_seconds=END_SECONDS,
    )


def _detected(coordinator: str, count: int | None, index: int | None, timeout: int):
    """The same three, with what a cluster tells in the place of what is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that this is not
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator or None, count, index, [], None, timeout
            )
        except Exception as error:  # noqa: BLE001  whatever a cluster's own tools raise
            reason = " ".join(str(error).split())
            raise UserError(f"the cluster does not tell its processes ({reason}); --cluster=none runs alone") from None
    return found[0] or "", found[1], found[2]


def _call_roll(port: int, count: int, deadline: float) -> list[int]:
    """Process 0's side: waits for the others, and tells all who have come who has not; returns those that never came.

    A process that comes says {"process": i, "count": n} in one line, and reads lines {"missing": [...], "over": bool},
    or {"error": text} where the processes contradict each other.
    """
    came: dict[socket.socket, int] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(port, deadline))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        while True:
            missing = sorted(set(range(1, count)) - set(came.values()))
            over = not missing or time.monotonic() >= deadline
            _tell(came, {"missing": missing, "over": over})
            if over:
                return missing
            for key, _ in selector.select(deadline - time.monotonic()):
                connection = key.fileobj
                if connection is listener:
                    connection = stack.enter_context(listener.accept()[0])
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                try:
                    hello = json.loads(connection.recv(HELLO_BYTES))
                    process = int(hello["process"])
                    error = _contradiction(process, int(hello["count"]), count, came)
                except (OSError, ValueError, KeyError, TypeError):  # it has left again, or was no process of ours
                    selector.unregister(connection)
                    connection.close()
                    came.pop(connection, None)
                    continue
                came[connection] = process
                if error:
                    _tell(came, {"error": error})
                    raise UserError(error)


def _contradiction(process: int, its_count: int, count: int, came: dict[socket.socket, int]) -> str:
    if its_count != count:
        return f"process {process} was started with --process_count={its_count}, process 0 with {count}"
    if process in came.values():
        return f"two processes were started with --process_index={process}"
    return ""


def _answer_roll_call(address: tuple[str, int], count: int, index: int, deadline: float) -> list[int]:
    """The other processes' side; returns those that never came, as far as this one was told."""
    missing = [0]
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall(json.dumps({"process": index, "count": count}).encode() + b"\n")
                connection.settimeout(max(0.0, deadline - time.monotonic()) + VERDICT_SECONDS)
                for line in connection.makefile():
                    message = json.loads(line)
                    if "error" in message:
                        raise UserError(message["error"])
                    missing = message["missing"]
                    if message["over"]:
                        return missing
            missing = sorted({0, *missing})  # it came and went
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or another's port still
            pass
        time.sleep(max(0.0, min(RETRY_SECONDS, deadline - time.monotonic())))
    return missing


def _listener(port: int, deadline: float) -> socket.socket:
    """Listens on every address, as JAX's coordinator does; the port may still be that of a run about to end."""
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(f"--coordinator: process 0 cannot listen on port {port}: {error}") from None
            time.sleep(RETRY_SECONDS)


def _tell(connections, message: dict) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # it will be found to have left
            connection.sendall(json.dumps(message).encode() + b"\n")


def is_distributed() -> bool:
    """Is this one of several processes? Touches no device."""
    return jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Is this process 0, which writes what is written once? Touches no device."""
    return global_state.process_id == 0


def barrier(what: str) -> None:
    """Returns when all processes have come here.

    On CPUs the first meeting fails after 30 s (Gloo's limit on making its connections); later ones wait as long as it
    takes. So a job begins with one, before compilation or its share of the work can keep a process longer than others.
    """
    if is_distributed():
        multihost_utils.sync_global_devices(what)


def end_after_error(code: int) -> int:
    """Returns the exit code when all processes have come to an error; else ends this process at once, with that code.

    The others may wait for this one in the middle of a computation, and would for ever if it waited for them in turn.
    """
    if is_distributed():
        try:
            global_state.client.wait_at_barrier("error", LAST_WORD_SECONDS * 1000)
        except jax.errors.JaxRuntimeError:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code
