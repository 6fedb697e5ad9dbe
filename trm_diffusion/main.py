"""The command line: parses the flags, looks up the job, runs it, and returns an exit code.

0   done
1   a check failed: --mode=doctor, or --mode=compile of a program that does not fit
2   the user's mistake, explained in one line
75  asked to stop (SIGTERM or Ctrl-C) and saved, or other processes of the run did not connect; the same command resumes
"""

import os
import signal
import sys
import threading
import traceback
import warnings

from trm_diffusion.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, Interrupted, UserError, told


def stop_at_once(signum, frame):
    """Handles SIGTERM and SIGINT until a job does (runtime/signals.py), above all while modules are imported."""
    del signum, frame
    os.write(2, b"stopped before the job had anything to save; start the same command again\n")
    os._exit(EXIT_RESUMABLE)


if __name__ == "__main__":  # worker processes import this module under another name
    signal.signal(signal.SIGINT, stop_at_once)
    signal.signal(signal.SIGTERM, stop_at_once)

from absl import logging  # noqa: E402  imports take seconds, in which a signal may come

from trm_diffusion import flags  # noqa: E402
from trm_diffusion.jobs.table import JOBS  # noqa: E402


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.FATAL)  # silences the libraries; this program prints its own messages
    threading.excepthook = in_thread
    try:
        return run(flags.parse(argv))
    except Exception as error:  # noqa: BLE001  other processes may be waiting for this one
        reason = told(error)
        if reason is None:
            traceback.print_exc()
            return after_error(1)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # what the error interrupted in libraries
        sys.unraisablehook = lambda _: None
        line = " ".join(str(reason).split())
        if isinstance(reason, Interrupted):
            print(f"{line}; start the same command again to resume", file=sys.stderr)
            return EXIT_RESUMABLE
        print(f"error: {line}", file=sys.stderr)
        return after_error(EXIT_USER_ERROR)


def in_thread(failed: threading.ExceptHookArgs) -> None:
    """Prints an error of a library's thread as Python would, unless it is the user's to mend: the job tells it then."""
    if told(failed.exc_value) is None:
        threading.__excepthook__(failed)


def after_error(code: int) -> int:
    from trm_diffusion.runtime.processes import end_after_error

    return end_after_error(code)


def run(options) -> int:
    """Connects the processes of the run, checks the device, and runs the job."""
    from trm_diffusion.runtime.devices import require_platform
    from trm_diffusion.runtime.processes import barrier, is_distributed, is_main_process, join

    job = JOBS[options.mode]
    index, count = options.process_index, options.process_count
    join(options.coordinator, count, index, detect=options.cluster == "auto", timeout=options.start_timeout)
    if not is_distributed() and not job.shared and (index is not None or count not in (None, 1)):
        raise UserError("--process_index and --process_count need --coordinator=HOST:PORT, the same for all processes")
    if job.one_process and not is_main_process():
        return 0
    require_platform(options.platform)
    if not job.one_process:
        barrier("the job begins")
    return job.run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
