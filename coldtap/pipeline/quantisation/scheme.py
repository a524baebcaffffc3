"""A scheme: how many bits weights and activations have, and which layers differ from it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self

from coldtap.stores.errors import OptionError

SCHEMES = ("w8a8", "w6a6", "w4a8", "w4a4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Bits of a weight and of an activation, each from 2 to 8."""

    weight_bits: int
    activation_bits: int

    @classmethod
    def parse(cls, name: str) -> Self:
        """The scheme of a name such as `w8a8`.

        Raises:
            OptionError: it is no such name.
        """
        found = re.fullmatch(r"w([2-8])a([2-8])", name)
        if found is None:
            raise OptionError(f"scheme {name!r}: choose one of {', '.join(SCHEMES)}")
        return cls(weight_bits=int(found[1]), activation_bits=int(found[2]))

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def largest_weight(self) -> int:
        """Weights are codes from −this to this."""
        return int(2 ** (self.weight_bits - 1)) - 1

    @property
    def largest_activation(self) -> int:
        """Activations are codes from 0 to this."""
        return int(2**self.activation_bits) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeByLayer:
    """A scheme, and the layers that have another; the last pattern that matches a name decides.

    Attributes:
        scheme: of all other layers.
        overrides: from a pattern of layer names (`*` and `?` as in a shell) to a scheme, or `float`.
    """

    scheme: Scheme
    overrides: Mapping[str, Scheme | Literal["float"]]

    def of(self, layer: str) -> Scheme | None:
        """The scheme of a layer; None where it stays float."""
        found: Scheme | Literal["float"] = self.scheme
        for pattern, other in self.overrides.items():
            if fnmatchcase(layer, pattern):
                found = other
        return found if isinstance(found, Scheme) else None


def parse_override(text: str) -> tuple[str, Scheme | Literal["float"]]:
    """Pattern and scheme of `PATTERN=SCHEME`.

    Raises:
        OptionError: it has another form.
    """
    pattern, equals, name = text.partition("=")
    if not equals or not pattern:
        raise OptionError(
            f"--override {text}: expected PATTERN=SCHEME, such as 'blocks.0.*=w8a8' or 'patch_embed.*=float'"
        )
    return pattern, "float" if name == "float" else Scheme.parse(name)
