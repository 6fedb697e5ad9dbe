"""Asked to stop: a first SIGTERM or SIGINT lets the job save and leave; a second one ends it at once."""

import signal


class StopRequest:
    """A context in which SIGTERM and SIGINT set `requested` instead of killing the process."""

    def __init__(self):
        self.requested = False

    def _ask(self, signum, frame):
        del frame
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
