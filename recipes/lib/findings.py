"""Claims, and whether runs bear them out."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A claim, whether it holds for our runs, and the numbers that decide it."""

    claim: str
    holds: bool
    numbers: str

    def __str__(self) -> str:
        return f"{'Seen' if self.holds else 'Not seen'}: {self.claim} ({self.numbers})."
