"""Programs that are compared take turns, in a new order each round."""

from trm_diffusion.runtime.timing import interleaved_seconds


def turns(rounds: int) -> tuple[list[str], dict[str, list[float]]]:
    called = []
    programs = {name: lambda name=name: called.append(name) for name in "abcd"}
    return called, interleaved_seconds(programs, rounds)


def test_every_round_runs_each_once_in_an_order_of_its_own():
    called, seconds = turns(6)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abcd", 6)
    rounds = [tuple(called[first : first + 4]) for first in range(0, 28, 4)]  # the first round warms up
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(rounds[1:])) > 1
    assert turns(6)[0] == called  # reproducible
