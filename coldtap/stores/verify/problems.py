"""What verification finds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: where (relative to the store), and what."""

    where: str
    what: str
