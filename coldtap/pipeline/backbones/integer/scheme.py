"""A scheme: how many bits weights and activations have, and which layers differ from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self

from coldtap.errors import OptionError

SCHEMES = ("w8a8", "w6a6", "w4a8", "w4a4")
FIRST_LAYERS = ("patch_embed.*", "conv1", "conv1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Bits of a weight and of an activation, each from 2 to 8."""

    weight_bits: int
    activation_bits: int

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the scheme of a name such as `w8a8`.

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
    """A scheme, and the layers that have another.

    The first layer reads pixels and is a thousandth of the work: it has eight bits, as in RepQ-ViT, unless overridden.

    Attributes:
        scheme: of all other layers.
        overrides: patterns of layer names (`*` and `?` as in a shell), each with a scheme or `float`; of those that
            match a name the last one counts.
    """

    scheme: Scheme
    overrides: Sequence[tuple[str, Scheme | Literal["float"]]] = ()

    @classmethod
    def parse(cls, scheme: str, overrides: Sequence[str]) -> Self:
        """Parse a scheme's name and `PATTERN=SCHEME` or `PATTERN=float`.

        Raises:
            OptionError: one of them has another form.
        """
        return cls(scheme=Scheme.parse(scheme), overrides=[parse_override(one) for one in overrides])

    def of(self, layer: str) -> Scheme | None:
        """Return the scheme of a layer; None where it stays float."""
        first = any(fnmatchcase(layer, pattern) for pattern in FIRST_LAYERS)
        found: Scheme | Literal["float"] = Scheme(weight_bits=8, activation_bits=8) if first else self.scheme
        for pattern, other in self.overrides:
            if fnmatchcase(layer, pattern):
                found = other
        return found if isinstance(found, Scheme) else None

    def require_layers(self, layers: Sequence[str]) -> None:
        """Require that every override is of some layer.

        Raises:
            OptionError: one is not, and would go unnoticed.
        """
        for pattern, _ in self.overrides:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise OptionError(
                    f"`overrides={f'{pattern}=…'!r}`: no layer has that name; layers are {', '.join(layers[:5])} …"
                )


def parse_override(text: str) -> tuple[str, Scheme | Literal["float"]]:
    """Parse pattern and scheme of `PATTERN=SCHEME`.

    Raises:
        OptionError: it has another form.
    """
    pattern, equals, name = text.partition("=")
    if not equals or not pattern:
        raise OptionError(
            f"`overrides={text!r}`: expected PATTERN=SCHEME, such as 'blocks.0.*=w8a8' or 'patch_embed.*=float'"
        )
    return pattern, "float" if name == "float" else Scheme.parse(name)
