"""A run is in doubt from its first skipped update until enough in a row are finite, also across a resume."""

from trm_diffusion.runtime.doubt import RECOVERED, Doubt


def added(doubt: Doubt, updates, skipped: bool) -> list[bool]:
    return [doubt.add(update, skipped) for update in updates]


def test_doubt_begins_once_and_ends_after_enough_finite_updates():
    doubt = Doubt({})
    assert not any(added(doubt, range(1, 10), False)) and doubt.since == 0
    assert added(doubt, (10, 11), True) == [True, False] and doubt.since == 10
    added(doubt, range(12, 12 + RECOVERED - 1), False)
    assert added(doubt, [200], True) == [False]  # one short
    added(doubt, range(201, 250), False)
    doubt = Doubt(doubt.record())  # a resume
    added(doubt, range(250, 201 + RECOVERED - 1), False)
    assert doubt.since == 10
    added(doubt, [201 + RECOVERED - 1], False)
    assert doubt.since == 0
    assert added(doubt, [400], True) == [True] and doubt.since == 400


def test_a_run_saved_by_an_older_version_is_not_in_doubt():
    assert Doubt({"updates": 3, "skipped_in_a_row": 0}).since == 0
