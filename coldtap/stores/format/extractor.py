"""The recipe's first part: how an image becomes features."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from coldtap.stores.format.canonical import digest_of
from coldtap.stores.format.fields import Fields, refused_as
from coldtap.stores.format.geometry import Geometry

OPTIONAL = ("weights", "quantisation", "precision", "preprocess")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A place in the backbone whose output may be kept; `others` are fields of a later coldtap."""

    name: str
    geometry: Geometry
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch tokens (height, width)."""
        return self.geometry.grid

    def to_dict(self) -> dict[str, Any]:
        """Return the tap as JSON."""
        return {"name": self.name, **self.geometry.to_dict(), **self.others}

    @classmethod
    def from_dict(cls, path: str, record: Any) -> "Tap":
        """Parse what `to_dict` gave.

        Raises:
            ValueError: a field is missing or of another form.
        """
        fields = Fields(path, record)
        grid = fields.wholes("grid", least=1)
        if len(grid) != 2:
            raise ValueError(f"{path}.grid is {grid}, not a height and a width")
        geometry = Geometry(
            grid=(grid[0], grid[1]),
            prefix_tokens=fields.whole("prefix_tokens", least=0),
            channels=fields.whole("channels", least=1),
        )
        others = fields.others("name", "grid", "prefix_tokens", "channels")
        return cls(name=fields.text("name"), geometry=geometry, others=others)


@dataclass(frozen=True, kw_only=True)
class ExtractorPart:
    """All that decides what the numbers of a tap mean.

    Attributes:
        architecture: name of the backbone.
        weights: SHA-256 of its weights.
        quantisation: scheme and artefact of a quantised backbone; None for a float one.
        precision: of its arithmetic.
        preprocess: from a picture to the backbone's input (`coldtap.pipeline.images`).
        taps: z0 … zN, or the stages of a stage network.
        others: fields that this coldtap does not know.
        lacks: names of the fields that the recipe does not have; they are None here, and stay away from its JSON.
    """

    architecture: str
    weights: str | None
    quantisation: Mapping[str, Any] | None
    precision: str | None
    preprocess: Mapping[str, Any] | None
    taps: tuple[Tap, ...]
    others: Mapping[str, Any] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the part: what adaptors and `predict` compare."""
        return digest_of(self.to_dict())

    @property
    def geometries(self) -> dict[int, Geometry]:
        """The geometry of every tap, by its index."""
        return {index: tap.geometry for index, tap in enumerate(self.taps)}

    def to_dict(self) -> dict[str, Any]:
        """Return the part as JSON: equal to what was parsed."""
        fields = {
            "architecture": self.architecture,
            "weights": self.weights,
            "quantisation": self.quantisation,
            "precision": self.precision,
            "preprocess": self.preprocess,
            "taps": [tap.to_dict() for tap in self.taps],
        }
        return {**{name: value for name, value in fields.items() if name not in self.lacks}, **self.others}

    @classmethod
    def from_dict(cls, record: Any, *, where: str) -> "ExtractorPart":
        """Parse what `to_dict` gave.

        Raises:
            CorruptStoreError: a field is missing or of another form.
        """
        with refused_as(f"{where}: its recipe does not describe the arrays of a store"):
            fields = Fields("extractor", record)
            lacks = fields.lacks(*OPTIONAL)
            taps = fields.items("taps")
            return cls(
                architecture=fields.text("architecture"),
                weights=None if "weights" in lacks else fields.text("weights"),
                quantisation=None if "quantisation" in lacks else fields.json_or_null("quantisation"),
                precision=None if "precision" in lacks else fields.text("precision"),
                preprocess=None if "preprocess" in lacks else fields.json("preprocess"),
                taps=tuple(Tap.from_dict(f"extractor.taps[{i}]", about) for i, about in enumerate(taps)),
                others=fields.others("architecture", "taps", *OPTIONAL),
                lacks=lacks,
            )
