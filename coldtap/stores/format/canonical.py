"""Canonical JSON and SHA-256: equal content, equal bytes, equal digest."""

import hashlib
import json
from typing import Any

type Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces and no NaN: one text for one value.

    Raises:
        ValueError: a float is not finite.
        TypeError: a value has no JSON form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def readable_json(value: Any) -> bytes:
    """Sorted, indented UTF-8 JSON with a final newline, for files that people open."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text that anyone may have written.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def safetensors_header(data: bytes) -> Any:
    """Return the JSON of a safetensors header: 8 bytes of length, then the header itself; raises as `parse_json`."""
    return parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hexadecimal."""
    return sha256(canonical_json(value))


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
