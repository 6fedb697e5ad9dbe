"""The two ways a job ends early on purpose, and their exit codes."""

EXIT_USER_ERROR = 2  # the user's mistake: one clear line says what, where and what to do
EXIT_RESUMABLE = 75  # everything is saved: start the same command again (EX_TEMPFAIL)


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, what to do."""


class Interrupted(Exception):
    """The job was asked to stop and has saved what it had, or lacks other processes; it goes on when started again."""
