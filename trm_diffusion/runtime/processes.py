"""Runs with several processes: how they connect, which ones are missing, and how they exit.

JAX waits for missing processes until it aborts, without naming them. So a run begins with a roll call at the
coordinator's address. Once all processes have connected, JAX takes over the same port.
"""

import contextlib
import itertools
import json
import os
import selectors
import socket
import sys
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np
from jax._src.clusters import ClusterEnv  # JAX has no public API for cluster detection
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from trm_diffusion.errors import Interrupted, UserError

RETRY_SECONDS = 0.2  # between attempts to reach process 0
VERDICT_SECONDS = 1  # past the deadline: connected processes wait to learn who is missing, and to be counted
HELLO_BYTES = 1024  # maximum size of the first message from a process
LAST_WORD_SECONDS = 10  # how long a process with an error waits for the others to have one too
MESSAGE_BYTES = 2048  # of an error of process 0, for the others
END_SECONDS = 7 * 24 * 3600  # how long processes wait for the others; JAX's heartbeats detect dead ones

_barriers = itertools.count()  # makes the name of every barrier unique


def join(coordinator: str, count: int | None, index: int | None, *, detect: bool, timeout: int) -> None:
    """Connects this process to the others of the run; does nothing if neither the arguments nor a cluster name any.

    Must be called before anything touches a device.

    Args:
      coordinator: HOST:PORT of process 0; "" is JAX_COORDINATOR_ADDRESS of the environment, or the cluster's.
      count, index: total number of processes, and the index of this one; None is the cluster's.
      detect: ask the clusters that JAX knows (Cloud TPU, SLURM, Open MPI, Kubernetes) for what is not given.
      timeout: seconds within which all processes must connect.

    Raises:
      UserError: arguments that contradict each other or those of the other processes.
      Interrupted: some processes did not connect in time; the message names them.
    """
    deadline = time.monotonic() + timeout
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if detect and (not coordinator or None in (count, index)):
        coordinator, count, index = _detected(coordinator, count, index, timeout)
    if not coordinator or count == 1:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT: the host of process 0, and a free port there")
    if count is None or index is None:
        raise UserError(f"--coordinator={coordinator} needs --process_count and --process_index")
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} must be at least 0 and less than --process_count={count}")
    if index == 0:
        missing = _call_roll(int(port), count, deadline)
    else:
        missing = _answer_roll_call((host.strip("[]"), int(port)), count, index, deadline)
    if missing:
        named = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        raise Interrupted(f"{named} of {count} did not connect to {coordinator} within {timeout} s")
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        cluster_detection_method=None if detect else "deactivate",  # the cluster may know this process's devices
        initialization_timeout=timeout,
        shutdown_timeout_seconds=END_SECONDS,
    )


def _detected(coordinator: str, count: int | None, index: int | None, timeout: int):
    """The same (coordinator, count, index), with missing values filled in by the cluster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from detectors of other clusters
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator or None, count, index, [], None, timeout
            )
        except Exception as error:  # noqa: BLE001  a cluster's own tools may raise anything
            reason = " ".join(str(error).split())
            raise UserError(f"cannot detect the processes ({reason}); --cluster=none turns this off") from None
    return found[0] or "", found[1], found[2]


def _call_roll(port: int, count: int, deadline: float) -> list[int]:
    """Process 0's side: waits for the others and tells them which are missing; returns those that never connected.

    A process that connects sends {"process": i, "count": n} in one line, and reads lines {"missing": [...], "over":
    bool}, or {"error": text} if the processes contradict each other.
    """
    connected: dict[socket.socket, int] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(port, deadline))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        while True:
            missing = sorted(set(range(1, count)) - set(connected.values()))
            over = not missing or time.monotonic() >= deadline
            _tell(connected, {"missing": missing, "over": over})
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
                    error = _contradiction(process, int(hello["count"]), count, connected)
                except (OSError, ValueError, KeyError, TypeError):  # it disconnected, or is not a process of this run
                    selector.unregister(connection)
                    connection.close()
                    connected.pop(connection, None)
                    continue
                connected[connection] = process
                if error:
                    _tell(connected, {"error": error})
                    raise UserError(error)


def _contradiction(process: int, its_count: int, count: int, connected: dict[socket.socket, int]) -> str:
    if its_count != count:
        return f"process {process} was started with --process_count={its_count}, process 0 with {count}"
    if process in connected.values():
        return f"two processes were started with --process_index={process}"
    return ""


def _answer_roll_call(address: tuple[str, int], count: int, index: int, deadline: float) -> list[int]:
    """The other processes' side; returns those that never connected, as far as process 0 has told."""
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
            missing = sorted({0, *missing})  # process 0 closed the connection early
        except (OSError, ValueError, KeyError, TypeError):  # process 0 is not there yet, or the port is taken
            pass
        time.sleep(max(0.0, min(RETRY_SECONDS, deadline - time.monotonic())))
    return missing


def _listener(port: int, deadline: float) -> socket.socket:
    """Listens on every address, as JAX's coordinator does. Retries while a previous run may still have the port."""
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(f"--coordinator: process 0 cannot listen on port {port} ({error})") from None
            time.sleep(RETRY_SECONDS)


def _tell(connections, message: dict) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # the roll call will notice that it disconnected
            connection.sendall(json.dumps(message).encode() + b"\n")


def is_distributed() -> bool:
    """Whether this is one of several processes. Touches no device."""
    return jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Whether this is process 0, which does all writing that happens once. Touches no device."""
    return global_state.process_id == 0


def barrier(what: str) -> None:
    """Returns when all processes have reached it, however long that takes."""
    if is_distributed():
        _wait_for_all(what)
        multihost_utils.sync_global_devices(what)  # connects the devices now, while all processes are here


def _wait_for_all(what: str) -> None:
    """A barrier of the coordination service, without any device: all must call it in the same order."""
    global_state.client.wait_at_barrier(f"{what} {next(_barriers)}", END_SECONDS * 1000)


def compiled_together(jitted: Callable) -> Callable:
    """The jitted function; with several processes, its first call starts once all have compiled it.

    On CPUs, processes whose collectives start more than 30 s apart fail: Gloo's limit for connecting a new group of
    devices, and for each reduce-scatter. Compilation takes that long on a slow machine, and not equally long.
    """
    if not is_distributed():
        return jitted
    compiled = False

    def call(*arguments):
        nonlocal compiled
        if not compiled:
            jitted.lower(*arguments).compile()  # the call below finds it in JAX's cache
            _wait_for_all("compiled")
            compiled = True
        return jitted(*arguments)

    return call


def from_main_process(text: str) -> str:
    """The `text` that process 0 has. All processes must call it."""
    if not is_distributed():
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = data if data.size == size else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()


def first_of_all(text: str) -> str:
    """The text of the first process whose text is not empty; "" if all are. All processes must call it."""
    if not is_distributed():
        return text
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(text.encode()))))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    texts = np.reshape(multihost_utils.process_allgather(padded), (len(lengths), -1))
    return next((one[:length].tobytes().decode() for one, length in zip(texts, lengths, strict=True) if length), "")


def in_process_0(act: Callable[[], None]) -> None:
    """Runs `act` in process 0. Every process raises the UserError or Interrupted that it raises there."""
    kinds = (UserError, Interrupted)
    error = None
    if is_main_process():
        try:
            act()
        except kinds as caught:
            error = caught
    if is_distributed():
        text = b"" if error is None else f"{kinds.index(type(error))}{error}".encode()
        sent = np.frombuffer(text[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes()
        message = received.rstrip(b"\0").decode(errors="replace")
        error = kinds[int(message[0])](message[1:]) if message else None
    if error is not None:
        raise error


def end_after_error(code: int) -> int:
    """Returns the exit code if all processes have an error; otherwise exits this process at once, with that code.

    The others may be waiting for this one in the middle of a computation, and would wait forever if it waited for them.
    """
    if is_distributed():
        try:
            global_state.client.wait_at_barrier("error", LAST_WORD_SECONDS * 1000)
        except jax.errors.JaxRuntimeError:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code
