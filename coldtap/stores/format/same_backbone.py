"""Two extractors of one backbone that differ, if at all, in the arithmetic that computes its features."""

from collections.abc import Mapping
from typing import Any

from coldtap.stores.format.recipe import differing_fields

ARITHMETIC = ("quantisation", "precision")


def differences_beyond_arithmetic(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return each field but quantisation and precision that differs between two extractors, as `field: old → new`."""
    return differing_fields(_without_arithmetic(old), _without_arithmetic(new))


def _without_arithmetic(extractor: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in extractor.items() if field not in ARITHMETIC}
