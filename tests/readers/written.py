"""Small inputs that go wrong, and what hypothesis damages."""

import contextlib

from hypothesis import strategies as st

from trm_diffusion.errors import UserError


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut off somewhere, or with one of them changed."""
    places = st.integers(0, len(data) - 1)
    cut = places.map(lambda end: data[:end])
    changed = st.tuples(places, st.integers(1, 255)).map(
        lambda change: data[: change[0]] + bytes([data[change[0]] ^ change[1]]) + data[change[0] + 1 :]
    )
    return cut | changed


@contextlib.contextmanager
def one_line_or_nothing():
    """Passes if the block ends well or in a one-line UserError; any other error is the test's."""
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error)
