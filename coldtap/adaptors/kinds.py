"""The adaptors that coldtap knows, by name."""

from typing import Any

from coldtap.adaptors.contract import AdaptorKind
from coldtap.adaptors.last import LAST
from coldtap.adaptors.linear import LINEAR
from coldtap.adaptors.mist import MIST
from coldtap.stores.errors import OptionError

ADAPTORS: dict[str, AdaptorKind[Any]] = {kind.name: kind for kind in (LINEAR, MIST, LAST)}


def adaptor_kind(name: str) -> AdaptorKind[Any]:
    """Returns the adaptor of a name.

    Raises:
        OptionError: There is no such adaptor.
    """
    if name not in ADAPTORS:
        raise OptionError(f"unknown adaptor {name!r}; known are {', '.join(ADAPTORS)}")
    return ADAPTORS[name]
