"""The command line: parses the flags, looks up the job, runs it, and returns an exit code.

0   done
1   a check failed: --mode=doctor, or --mode=compile of a program that does not fit
2   the user's mistake, explained in one line
75  asked to stop (SIGTERM or Ctrl-C) and saved, or other processes of the run did not connect; the same command resumes
"""

import sys
import traceback

from absl import logging

from trm_diffusion import flags
from trm_diffusion.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, Interrupted, UserError
from trm_diffusion.jobs.table import JOBS


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.ERROR)  # silences the libraries; this program prints its own messages
    try:
        return run(flags.parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return after_error(EXIT_USER_ERROR)
    except Interrupted as error:
        print(f"{error}; start the same command again to resume", file=sys.stderr)
        return EXIT_RESUMABLE
    except Exception:  # noqa: BLE001  printed as Python would; other processes may be waiting for this one
        traceback.print_exc()
        return after_error(1)


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
