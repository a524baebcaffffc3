"""What taps share: their grid, prefix tokens and channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Geometry:
    """The shape that taps share: prefix tokens first, then the grid in row-major order, each of `channels`."""

    grid: tuple[int, int]
    prefix_tokens: int
    channels: int

    @property
    def tokens(self) -> int:
        """Tokens of one tap: prefix tokens and grid cells."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def name(self) -> str:
        """A path-safe name, such as `g8x8-p1-c192`."""
        return f"g{self.grid[0]}x{self.grid[1]}-p{self.prefix_tokens}-c{self.channels}"

    def to_dict(self) -> dict[str, Any]:
        """Return the geometry as JSON."""
        return {"grid": list(self.grid), "prefix_tokens": self.prefix_tokens, "channels": self.channels}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Geometry":
        """Parse what `to_dict` gave; a missing or unknown key is a TypeError."""
        return cls(**{**record, "grid": tuple(record["grid"])})
