"""Asked to stop: a first SIGTERM or SIGINT lets the job save and leave; a second one ends it at once.

Several processes of one run stop at the same place, whichever of them was asked; JAX's preemption service settles
where, within about two seconds. It listens to SIGTERM itself from the start of the run to its end, so that a second
SIGTERM does no more.
"""

import signal

from jax.experimental import multihost_utils

from trm_diffusion.runtime.processes import is_distributed


class StopRequest:
    """A context in which SIGTERM and SIGINT ask to stop instead of killing the process.

    together: the processes of a run do the same at the same time and ask `reached` at the same places; False where each
    works and stops on its own.
    """

    def __init__(self, *, together: bool = True):
        self.requested = False  # of this process
        self._together = together and is_distributed()
        self._places = 0

    def reached(self) -> bool:
        """Is this the place to stop?"""
        if not self._together:
            return self.requested
        self._places += 1
        return multihost_utils.reached_preemption_sync_point(self._places)

    def _ask(self, signum, frame):
        del frame
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)
        if self._together:
            signal.raise_signal(signal.SIGTERM)  # the preemption service's

    def __enter__(self):
        asking = (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT)
        self._previous = {s: signal.signal(s, self._ask) for s in asking}
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
