"""Config fields reject values that they do not accept, and say in one line which they do."""

import dataclasses

import pytest

from trm_diffusion.models.settings import Allowed, Settings, setting


@dataclasses.dataclass(frozen=True)
class Example(Settings):
    kind: str = setting("plain", choices={"plain": 1, "fancy": 2})
    inputs: str = setting("a,b", some_of=("a", "b", "c"))
    count: int = setting(1, least=1)
    width: int = setting(8, least=4, multiple_of=4)
    share: float = setting(0.5, least=0, below=1)
    chance: float = setting(0.5, above=0, below=1)
    scale: float = setting(1.0, above=0)
    shards: int = setting(-1, also=(-1,), least=1)
    depth: int | None = setting(None, least=1)
    decays: tuple = setting((0.5,), least=0, most=1)
    free: float = 0.0


@pytest.mark.parametrize(
    "change",
    [
        dict(kind="fancy"),
        dict(inputs="c"),
        dict(count=1),
        dict(share=0.0),
        dict(shards=3),
        dict(depth=2),
        dict(decays=()),
        dict(decays=(0.0, 1.0)),
        dict(free=-1e9),
    ],
)
def test_takes(change):
    assert dataclasses.asdict(Example(**change)) == dataclasses.asdict(Example()) | change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(kind="odd"), "kind is 'odd'; choose one of plain, fancy"),
        (dict(inputs="a,d"), "inputs is 'a,d'; choose some of a,b,c"),
        (dict(inputs=""), "inputs is ''; choose some of a,b,c"),
        (dict(count=0), "count is 0; it must be at least 1"),
        (dict(width=6), "width is 6; it must be at least 4 and a multiple of 4"),
        (dict(share=1.0), "share is 1.0; it must be in [0, 1)"),
        (dict(share=float("nan")), "share is nan; it must be in [0, 1)"),
        (dict(chance=0.0), "chance is 0.0; it must be in (0, 1)"),
        (dict(scale=0.0), "scale is 0.0; it must be above 0"),
        (dict(shards=0), "shards is 0; it must be -1 or at least 1"),
        (dict(depth=0), "depth is 0; it must be at least 1"),
        (dict(decays=(0.5, 2.0)), "decays is (0.5, 2.0); each must be in [0, 1]"),
    ],
)
def test_refuses(change, says):
    with pytest.raises(ValueError) as refusal:
        Example(**change)
    assert str(refusal.value) == says


def test_replaced_fields_are_checked_too():
    with pytest.raises(ValueError, match="count is 0"):
        dataclasses.replace(Example(), count=0)


def test_bounds_in_words():
    assert str(Allowed(most=3)) == "at most 3"
    assert str(Allowed(below=3)) == "below 3"
    assert str(Allowed(above=0, most=3)) == "in (0, 3]"
    assert str(Allowed(multiple_of=4)) == "a multiple of 4"
