"""When a run's updates stopped being finite, and whether they have recovered."""

RECOVERED = 100  # finite updates in a row after which a run is no longer in doubt


class Doubt:
    """In doubt from the first skipped (non-finite) update until `RECOVERED` updates in a row are finite."""

    def __init__(self, record: dict):
        self.since = record.get("doubt_since", 0)  # number of the first skipped update; 0 without doubt
        self._finite_in_a_row = record.get("finite_in_a_row", 0)

    def add(self, update: int, skipped: bool) -> bool:
        """Counts one update; returns whether the doubt begins with it."""
        begins = skipped and not self.since
        self._finite_in_a_row = 0 if skipped else self._finite_in_a_row + 1
        if begins:
            self.since = update
        elif self._finite_in_a_row >= RECOVERED:
            self.since = 0
        return begins

    def record(self) -> dict:
        """What a resume needs, as JSON."""
        return {"doubt_since": self.since, "finite_in_a_row": self._finite_in_a_row}
