"""The adaptors that coldtap knows, by name, and any other by `module:NAME`."""

import importlib
from typing import Any

from coldtap.adaptors.networks.attentive import ATTENTIVE
from coldtap.adaptors.networks.combo import COMBO
from coldtap.adaptors.networks.contract import AdaptorKind
from coldtap.adaptors.networks.head2toe import HEAD2TOE
from coldtap.adaptors.networks.ladder import LADDER
from coldtap.adaptors.networks.last import LAST
from coldtap.adaptors.networks.linear import LINEAR
from coldtap.adaptors.networks.mist import MIST
from coldtap.errors import OptionError

# Probes first, then the networks that mix tokens.
ADAPTORS: dict[str, AdaptorKind[Any]] = {
    kind.name: kind for kind in (LINEAR, ATTENTIVE, HEAD2TOE, MIST, LADDER, COMBO, LAST)
}


def adaptor_kind(name: str) -> AdaptorKind[Any]:
    """Return the adaptor of a name: one of coldtap's own, or `module:NAME`, an `AdaptorKind` in an importable module.

    Raises:
        OptionError: There is no such adaptor.
    """
    if ":" in name:
        return _imported(name)
    if name not in ADAPTORS:
        raise OptionError(f"unknown adaptor {name!r}; known are {', '.join(ADAPTORS)}, and others as module:NAME")
    return ADAPTORS[name]


def recorded_kind(name: str, *, asked: str | None, where: str) -> AdaptorKind[Any]:
    """Return the adaptor that a file names: nothing is imported because a file says so.

    Args:
        name: What the file says: one of coldtap's own, or `module:NAME`.
        asked: What the caller names; it must agree, and is needed for `module:NAME`.
        where: The file, for messages.

    Raises:
        OptionError: There is no such adaptor, or the caller names another one, or none where one is needed.
    """
    if asked is not None and asked != name:
        raise OptionError(f"`adaptor={asked!r}`: {where} is of the adaptor {name!r}: leave `adaptor` out, or name that")
    if asked is None and ":" in name:
        raise OptionError(
            f"the adaptor {name!r} is none of coldtap's own ({', '.join(ADAPTORS)}), and nothing was imported: if you "
            f"know that code and trust it, name it yourself: `adaptor={name!r}`"
        )
    return adaptor_kind(name)


def _imported(name: str) -> AdaptorKind[Any]:
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"adaptor {name!r} cannot be imported ({error}): give module:NAME, on Python's path"
        ) from error
    if not isinstance(kind, AdaptorKind):
        raise OptionError(f"adaptor {name!r} is a {type(kind).__name__}, not an AdaptorKind")
    return kind
