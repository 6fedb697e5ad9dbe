"""A disk that is full as far as this process can tell."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(bytes_left: int = 0):
    """Writing a file beyond `bytes_left` bytes fails with EFBIG, as it does with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
