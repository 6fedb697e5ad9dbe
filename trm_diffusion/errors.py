"""The two ways a job ends early on purpose, and their exit codes."""

EXIT_USER_ERROR = 2  # user error: one line says what is wrong, where and what to do
EXIT_RESUMABLE = 75  # progress is saved: run the same command again (EX_TEMPFAIL)


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, what to do."""


class Interrupted(Exception):
    """The job was asked to stop and saved its progress, or other processes are missing. It resumes when rerun."""
