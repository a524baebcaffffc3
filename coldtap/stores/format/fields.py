"""Fields of a JSON object that anyone may have written: each is taken by name, with the type that it must have."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import msgspec

from coldtap.errors import CorruptStoreError

# Sizes that a file states and a reader makes room for before it sees one such thing (docs/security.md).
MAX_CLASSES = 1 << 20
MAX_BLOCK_ROWS = 1 << 16
MAX_VIEWS = 1 << 16


def require_types[RecordT](record: RecordT) -> RecordT:
    """Return a dataclass that was made from JSON as it is, each field of the type that its class says.

    Raises:
        ValueError: a field, at any depth, is of another type.
    """
    try:
        msgspec.convert(asdict(record), type(record), str_keys=True)  # type: ignore[call-overload]  # a dataclass
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return record


class Fields:
    """The fields of one JSON object, taken one by one.

    Every method raises ValueError with the field's path where the field is missing or of another form.
    """

    def __init__(self, path: str, record: Any) -> None:
        self._path = path
        if not isinstance(record, Mapping):
            raise ValueError(f"{path} is {record!r:.60}, not a JSON object")
        self._record = record

    def _taken(self, name: str, expected: str, *types: type) -> Any:
        if name not in self._record:
            raise ValueError(f"{self._path}.{name} is missing")
        value = self._record[name]
        if type(value) not in types:
            raise ValueError(f"{self._path}.{name} is {value!r:.60}, not {expected}")
        return value

    def text(self, name: str) -> str:
        """Return a text."""
        return str(self._taken(name, "a text", str))

    def number(self, name: str) -> int:
        """Return a whole number, negative ones included."""
        return int(self._taken(name, "a whole number", int))

    def whole(self, name: str, *, least: int, most: int | None = None) -> int:
        """Return a whole number from `least` to `most`."""
        value = _whole(f"{self._path}.{name}", self._taken(name, "a whole number", int), least)
        if most is not None and value > most:
            raise ValueError(f"{self._path}.{name} is {value!r:.60}; this coldtap reads {most} at most")
        return value

    def wholes(self, name: str, *, least: int) -> tuple[int, ...]:
        """Return whole numbers from `least`."""
        values = self._taken(name, "a list of whole numbers", list, tuple)
        return tuple(_whole(f"{self._path}.{name}", value, least) for value in values)

    def json(self, name: str) -> Mapping[str, Any]:
        """Return a JSON object as it is."""
        found: Mapping[str, Any] = self._taken(name, "a JSON object", dict)
        return found

    def json_or_null(self, name: str) -> Mapping[str, Any] | None:
        """Return a JSON object as it is, or None."""
        found: Mapping[str, Any] | None = self._taken(name, "a JSON object or null", dict, type(None))
        return found

    def items(self, name: str) -> Sequence[Any]:
        """Return a list that is not empty."""
        found: Sequence[Any] = self._taken(name, "a list", list, tuple)
        if not found:
            raise ValueError(f"{self._path}.{name} is empty")
        return found

    def others(self, *known: str) -> dict[str, Any]:
        """Return the fields whose names are not among the known ones."""
        return {name: value for name, value in self._record.items() if name not in known}

    def lacks(self, *optional: str) -> frozenset[str]:
        """Return those of the names that are not there."""
        return frozenset(name for name in optional if name not in self._record)


def _whole(path: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{path} is {value!r:.60}, not a whole number from {least}")
    return value


@contextmanager
def refused_as(message: str) -> Iterator[None]:
    """Turn what `Fields` raises into an error of a store.

    Raises:
        CorruptStoreError: a field is missing or of another form.
    """
    try:
        yield
    except ValueError as error:
        raise CorruptStoreError(f"{message} ({error})") from error
