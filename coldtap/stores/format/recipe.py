"""The recipe: what was asked of a store, in three parts, each with its own digest.

`extractor` says how an image becomes features, `rows` which images stand where, `encoding` how numbers are
kept. What a run finds out (scales, ranges, library versions) is recorded beside the recipe, never in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coldtap.errors import CorruptStoreError, OptionError
from coldtap.stores.format.arrays import ArraySpec, plan_arrays
from coldtap.stores.format.canonical import canonical_json, digest_of
from coldtap.stores.format.encoding_part import EncodingPart
from coldtap.stores.format.extractor import ExtractorPart
from coldtap.stores.format.features import FORMAT, KNOWN, READABLE, WRITTEN
from coldtap.stores.format.rows_part import RowsPart

ADDRESS_FORMAT = 1  # for ever: an equal request has an equal address, whatever the format of its store
PARTS = ("extractor", "rows", "encoding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Three parts; the address is the hash of their digests.

    Attributes:
        format: of the store, which says how the answer is kept and is no part of what was asked.
        requires: names of the format's features that the store is made with (`features.py`).
    """

    extractor: ExtractorPart
    rows: RowsPart
    encoding: EncodingPart
    format: int = FORMAT
    requires: tuple[str, ...] = WRITTEN

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Each part as JSON, by its name."""
        return {
            "extractor": self.extractor.to_dict(),
            "rows": self.rows.to_dict(),
            "encoding": self.encoding.to_dict(),
        }

    @property
    def extractor_digest(self) -> str:
        """SHA-256 of the extractor part: what adaptors and `predict` compare."""
        return self.extractor.digest

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each part, by the part's name."""
        return {part: digest_of(record) for part, record in self.parts.items()}

    @property
    def address(self) -> str:
        """SHA-256 over the three digests: the name of what was asked."""
        return _address(self.digests)

    def to_dict(self) -> dict[str, Any]:
        """Return the parts with their digests and the address, as `recipe.json` keeps them; keys sorted throughout."""
        return signed_record(self.parts, store_format=self.format, requires=self.requires)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, where: str) -> "Recipe":
        """Parse what `to_dict` gave.

        Raises:
            CorruptStoreError: another format or feature, a missing or unknown key, digests that do not match, or a
                field that is missing or of another form.
        """
        store_format, requires = _format_of(record, where)
        known = {"format", "address", "digests", "recorded", *PARTS} | ({"requires"} if store_format > 1 else set())
        if unknown := sorted(set(record) - known):
            raise CorruptStoreError(f"{where} has unknown keys {unknown}; known are {sorted(known)}")
        if missing := sorted((known - {"recorded"}) - set(record)):
            raise CorruptStoreError(f"{where} lacks {missing}")
        for part in PARTS:
            if not isinstance(record[part], dict):
                raise CorruptStoreError(f"{where}: {part!r} is not a JSON object")
        _require_digests(record, where)
        recipe = cls.from_parts({part: record[part] for part in PARTS}, where=where)
        return replace(recipe, format=store_format, requires=requires)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], *, where: str) -> "Recipe":
        """Parse the three parts.

        Raises:
            CorruptStoreError: a field is missing or of another form.
        """
        return cls(
            extractor=ExtractorPart.from_dict(parts["extractor"], where=where),
            rows=RowsPart.from_dict(parts["rows"], where=where),
            encoding=EncodingPart.from_dict(parts["encoding"], where=where),
        )

    def arrays(self, *, where: str) -> tuple[ArraySpec, ...]:
        """Return the arrays that the recipe asks for.

        Raises:
            CorruptStoreError: it gathers a tap that the extractor does not have, or in a way that cannot be.
        """
        encoding = self.encoding
        try:
            specs = plan_arrays(self.extractor.geometries, encoding.gathers, encoding.tier, encoding.layout)
        except (KeyError, IndexError, OptionError) as error:
            raise CorruptStoreError(
                f"{where}: its recipe does not describe the arrays of a store ({error!r})"
            ) from error
        return tuple(replace(spec, block_rows=encoding.block_rows) for spec in specs)


def _format_of(record: Mapping[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
    """The format of a store and the features that reading it requires, all of which this coldtap knows."""
    store_format, requires = record.get("format"), record.get("requires", [])
    if type(store_format) is not int or store_format not in READABLE:
        raise CorruptStoreError(
            f"{where} is of store format {store_format!r}; this coldtap reads formats "
            f"{' and '.join(map(str, READABLE))}: read it with a newer coldtap"
        )
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise CorruptStoreError(f"{where}: `requires` is not a list of names of features")
    if unknown := sorted(set(requires) - KNOWN):
        raise CorruptStoreError(
            f"{where}: reading this store requires {', '.join(map(repr, unknown))}, which this coldtap does not know "
            f"(it knows {', '.join(sorted(KNOWN))}): read it with a newer coldtap"
        )
    return store_format, tuple(requires)


def signed_record(
    parts: Mapping[str, Mapping[str, Any]], *, store_format: int = FORMAT, requires: Sequence[str] = WRITTEN
) -> dict[str, Any]:
    """Return the JSON of three parts with their digests and the address; keys sorted on every level."""
    digests = {part: digest_of(parts[part]) for part in PARTS}
    whole = {"format": store_format, "address": _address(digests), "digests": digests, **parts}
    if store_format > 1:
        whole["requires"] = list(requires)
    # A recipe that was read and one that was made then leave the same bytes in the root group's attributes.
    sorted_keys: dict[str, Any] = json.loads(canonical_json(whole))
    return sorted_keys


def _address(digests: Mapping[str, str]) -> str:
    return digest_of({"format": ADDRESS_FORMAT, **digests})


def _require_digests(record: Mapping[str, Any], where: str) -> None:
    try:
        signed = signed_record({part: record[part] for part in PARTS})
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{where} holds what canonical JSON does not ({error})") from error
    if any(record[key] != signed[key] for key in ("digests", "address")):
        raise CorruptStoreError(f"{where}: its digests are not those of its parts; it was edited by hand")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return each field that differs between two recipes, as `part.field: old → new`."""
    before, after = old.parts, new.parts
    return [line for part in PARTS for line in _differ(part, before[part], after[part])]


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return each field that differs between two extractors, as `field: old → new`."""
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
