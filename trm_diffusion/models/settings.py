"""Config dataclasses whose fields declare the values they accept and reject all others.

    @dataclasses.dataclass(frozen=True)
    class OptimConfig(Settings):
        schedule: str = setting("constant", choices=SCHEDULES)  # after the warm-up
        b1: float = setting(0.9, least=0, below=1)  # first-moment decay
        ema_warmup: bool = True  # a field that accepts every value of its type needs no `setting`

Constructing one with a value out of range raises a one-line ValueError, "b1 is 1.5; it must be in [0, 1)".
"""

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a field accepts. None is always allowed; every entry of a tuple is checked."""

    choices: tuple = ()  # one of these
    some_of: tuple[str, ...] = ()  # one or more of these, separated by commas
    also: tuple = ()  # these, whatever the bounds
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.some_of:
            return set(value.split(",")) <= set(self.some_of)
        within = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )
        return within or value in self.also

    def __str__(self) -> str:
        """For error messages: "one of adamw, muon", "at least 1", "-1 or at least 1", "in [0, 1)"."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.some_of:
            return f"some of {','.join(self.some_of)}"
        parts = [str(value) for value in self.also] + [bounds for bounds in [self._bounds()] if bounds]
        text = " or ".join(parts)
        multiple = f"a multiple of {self.multiple_of}" if self.multiple_of else ""
        return " and ".join(filter(None, (text, multiple)))

    def _bounds(self) -> str:
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            return f"in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if low is not None:
            return f"{'at least' if self.above is None else 'above'} {low}"
        return f"{'at most' if self.below is None else 'below'} {high}" if high is not None else ""

    def check(self, name: str, value: Any) -> None:
        """Raises a one-line ValueError unless the value is allowed."""
        entries = value if isinstance(value, tuple) else (value,)
        if all(entry is None or entry in self for entry in entries):
            return
        each = "each" if isinstance(value, tuple) else "it"
        wish = f"choose {self}" if self.choices or self.some_of else f"{each} must be {self}"
        raise ValueError(f"{name} is {value!r}; {wish}")


def setting(
    default: Any,
    *,
    choices: Iterable = (),
    some_of: Iterable[str] = (),
    also: Iterable = (),
    path: bool = False,
    **bounds: float,
) -> Any:
    """A `Settings` field with its default and, as metadata, the values it accepts; for the keywords see `Allowed`.

    path: it holds a path, whose `~` is expanded when a config is resolved.
    """
    allowed = Allowed(tuple(choices), tuple(some_of), tuple(also), **bounds)
    return dataclasses.field(default=default, metadata={"path": True} if path else {"allowed": allowed})


class Settings:
    """Base of config dataclasses: every field is checked at construction."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            allowed = field.metadata.get("allowed")
            if allowed is not None:
                allowed.check(field.name, getattr(self, field.name))
