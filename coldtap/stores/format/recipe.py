"""The recipe: what was asked of a store, in three parts, each with its own digest.

`extractor` says how an image becomes features, `rows` which images stand where, `encoding` how numbers are
kept. What a run finds out (scales, ranges, library versions) is recorded beside the recipe, never in it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coldtap.errors import CorruptStoreError
from coldtap.stores.format.canonical import canonical_json, digest_of

FORMAT = 1
PARTS = ("extractor", "rows", "encoding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Three canonical JSON objects; the address is the hash of their digests."""

    extractor: Mapping[str, Any]
    rows: Mapping[str, Any]
    encoding: Mapping[str, Any]

    @property
    def extractor_digest(self) -> str:
        """SHA-256 of the extractor part: what adaptors and `predict` compare."""
        return digest_of(self.extractor)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each part, by the part's name."""
        return {part: digest_of(getattr(self, part)) for part in PARTS}

    @property
    def address(self) -> str:
        """SHA-256 over the format's number and the three digests: the name of what was asked."""
        return digest_of({"format": FORMAT, **self.digests})

    def to_dict(self) -> dict[str, Any]:
        """The parts with their digests and the address, as `recipe.json` keeps them; keys sorted on every level."""
        parts = {part: dict(getattr(self, part)) for part in PARTS}
        whole = {"format": FORMAT, "address": self.address, "digests": self.digests, **parts}
        # A recipe that was read and one that was made then leave the same bytes in the root group's attributes.
        sorted_keys: dict[str, Any] = json.loads(canonical_json(whole))
        return sorted_keys

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, where: str) -> "Recipe":
        """Parse what `to_dict` gave.

        Raises:
            CorruptStoreError: another format, a missing or unknown key, or digests that do not match.
        """
        known = {"format", "address", "digests", "recorded", *PARTS}
        if record.get("format") != FORMAT:
            raise CorruptStoreError(
                f"{where} is of store format {record.get('format')!r}; this coldtap reads format {FORMAT}"
            )
        if unknown := sorted(set(record) - known):
            raise CorruptStoreError(f"{where} has unknown keys {unknown}; known are {sorted(known)}")
        if missing := sorted((known - {"recorded"}) - set(record)):
            raise CorruptStoreError(f"{where} lacks {missing}")
        for part in PARTS:
            if not isinstance(record[part], dict):
                raise CorruptStoreError(f"{where}: {part!r} is not a JSON object")
        recipe = cls(**{part: record[part] for part in PARTS})
        try:
            same = record["digests"] == recipe.digests and record["address"] == recipe.address
        except (ValueError, RecursionError) as error:
            raise CorruptStoreError(f"{where} holds what canonical JSON does not ({error})") from error
        if not same:
            raise CorruptStoreError(f"{where}: its digests are not those of its parts; it was edited by hand")
        return recipe


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Each field that differs between two recipes, as `part.field: old → new`."""
    return [line for part in PARTS for line in _differ(part, getattr(old, part), getattr(new, part))]


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Each field that differs between two extractors, as `field: old → new`."""
    return [line.removeprefix("extractor.") for line in _differ("extractor", old, new)]


def _differ(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            yield from _differ(f"{path}.{key}", old.get(key, "(absent)"), new.get(key, "(absent)"))
    elif old != new:
        yield f"{path}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
