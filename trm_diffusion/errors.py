"""The two ways a job ends early on purpose, their exit codes, and how a library's error becomes one of them."""

import errno
import os
import re
from collections.abc import Iterator

EXIT_USER_ERROR = 2  # user error: one line says what is wrong, where and what to do
EXIT_RESUMABLE = 75  # progress is saved: run the same command again (EX_TEMPFAIL)


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, what to do."""


class Interrupted(Exception):
    """The job was asked to stop and saved its progress, or other processes are missing. It resumes when rerun."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {  # by error number; what to do about a path that cannot be read or written
    **dict.fromkeys(FULL, "free some space, or choose another place"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a place where you may write"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be: move it, or choose another path"
    ),
    **dict.fromkeys((errno.EISDIR, errno.ENOTEMPTY), "a folder is in its place: move it, or choose another path"),
}


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """The one line for an error while `path` was written."""
    other = error.filename
    inside = "" if other is None or ".partial-" in str(other) or str(other) == str(path) else f": {other}"
    reason = f"{error.strerror or error}{inside}"
    return UserError(f"{path} cannot be written ({reason}): {_remedy(error.errno)}")


def told(error: BaseException) -> Exception | None:
    """What the user is told of an error: the UserError or Interrupted that led to it, or a line about a file.

    Returns None if the error is a fault of the program.
    """
    for link in _chain(error, set(), contexts=True):
        if isinstance(link, UserError | Interrupted):
            return link
    # Not the contexts: a library may have tried a file, not found it, and failed at something else.
    for link in _chain(error, set(), contexts=False):
        if isinstance(link, OSError) and link.errno and link.filename is not None:
            return UserError(f"{link.filename}: {link.strerror}: {_remedy(link.errno)}")
        number = link.errno if isinstance(link, OSError) else _number_in(str(link))
        if number in (*FULL, errno.EROFS):
            return UserError(
                f"a file cannot be written ({os.strerror(number)}{_path_in(str(link))}): {_remedy(number)}"
            )
    return None


def _chain(error: BaseException | None, seen: set[int], *, contexts: bool) -> Iterator[BaseException]:
    """The error, those it contains, and those that caused it; contexts: also those in whose handling it was raised."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _chain(part, seen, contexts=contexts)
    yield from _chain(error.__cause__, seen, contexts=contexts)
    if contexts and not error.__suppress_context__:
        yield from _chain(error.__context__, seen, contexts=contexts)


def _number_in(text: str) -> int | None:
    """The error number in a message of TensorStore, which writes the arrays of checkpoints."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found[1]) if found else None


def _path_in(text: str) -> str:
    paths = re.findall(r'"((?:/|\w+://)[^"]*)"', text)
    return f": {paths[-1]}" if paths else ""


def _remedy(number: int | None) -> str:
    return REMEDIES.get(number, "check the path and the storage") + "; then start the same command again"
