"""Stop requests: the first SIGTERM or SIGINT lets the job save and exit; a second one ends it at once.

The processes of one run stop at the same point, whichever of them received the signal. JAX's preemption service agrees
on that point within about two seconds. It handles SIGTERM itself from the start of the run to its end, so a second
SIGTERM has no further effect there.
"""

import signal

from jax.experimental import multihost_utils

from trm_diffusion.runtime.processes import is_distributed


class StopRequest:
    """A context in which SIGTERM and SIGINT request a stop instead of killing the process.

    together: the processes of a run work in lockstep and call `reached` at the same points; False if each works and
    stops on its own.
    """

    def __init__(self, *, together: bool = True):
        self.requested = False  # by a signal to this process
        self._together = together and is_distributed()
        self._places = 0

    def reached(self) -> bool:
        """Whether to stop at this point."""
        if not self._together:
            return self.requested
        self._places += 1
        return multihost_utils.reached_preemption_sync_point(self._places)

    def _ask(self, signum, frame):
        del frame
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)
        if self._together:
            signal.raise_signal(signal.SIGTERM)  # for JAX's preemption service

    def __enter__(self):
        asking = (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT)
        self._previous = {s: signal.signal(s, self._ask) for s in asking}
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
