"""The parameters of groups of LSA modules, folded into the few matrices that `lsa_group` computes with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LsaShape:
    """How modules are built, and how many there are: `groups` of `modules` each. `eps` is None without a norm."""

    groups: int
    modules: int
    rank: int
    heads: int
    scale: float
    biased: bool
    eps: float | None

    @property
    def width(self) -> int:
        """Numbers a token that a module adds: its rank, and one that is always 1 and carries the bias."""
        return self.rank + self.biased

    @property
    def own_rows(self) -> int:
        """Rows of `Matrices.into` that a module's A_O takes: the variance needs them, and only a norm needs that."""
        return 0 if self.eps is None else self.width

    @property
    def stride(self) -> int:
        """Rows of `Matrices.into` from one module to the next."""
        return 3 * self.rank + self.own_rows

    @property
    def least_variance(self) -> float:
        """What a variance plus eps cannot be below."""
        return self.eps or 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of a module, by their names in it."""
        biases = ("down_bias", "up_bias") if self.biased else ()
        return ("down", "up", *biases, *(() if self.eps is None else ("norm.weight", "norm.bias")))

    @property
    def n_parameters(self) -> int:
        """The parameters of all modules."""
        return len(self.names) * self.groups * self.modules


class Matrices(NamedTuple):
    """Folded parameters; D is A_Q, A_K and A_V times the norm's weight, Q divided by √(r/h) besides.

    With a norm, `into` is centred over the channels. Row and column say which module they belong to.

    Attributes:
        into: (group, row, channel), the columns of D and then the rows of s · A_O, module by module, without the last
            module's A_O.
        out: (group, module · width, channel), s · A_O.
        couple: (group, row, module · width), into · outᵀ where the row is wanted after that module, else 0.
        shift: (group, module, 3 · rank), what the norm's bias and the module's add to Q, K and V.
    """

    into: torch.Tensor
    out: torch.Tensor
    couple: torch.Tensor
    shift: torch.Tensor

    def of_group(self, i: int) -> "Matrices":
        """Return the matrices of one group, as views without the first axis."""
        return Matrices(*(matrix[i] for matrix in self))


def fold(shape: LsaShape, parameters: Sequence[torch.Tensor]) -> Matrices:
    """Fold parameters, by `LsaShape.names` and then by module; differentiable, and small beside any feature."""
    n_modules = shape.groups * shape.modules
    stacked = {
        name: torch.stack(list(parameters[i * n_modules : (i + 1) * n_modules])).unflatten(0, (shape.groups, -1))
        for i, name in enumerate(shape.names)
    }
    down, out = stacked["down"], shape.scale * stacked["up"]  # (group, module, channel, q|k|v), (…, rank, channel)
    shift = down.new_zeros(shape.groups, shape.modules, 3 * shape.rank)
    if shape.eps is not None:
        shift = (stacked["norm.bias"].unsqueeze(-2) @ down).squeeze(-2)
        down = stacked["norm.weight"].unsqueeze(-1) * down
    if shape.biased:
        shift = shift + stacked["down_bias"]
        out = torch.cat([out, shape.scale * stacked["up_bias"].unsqueeze(-2)], dim=-2)
    temperature = torch.ones_like(shift[0, 0])
    temperature[: shape.rank] = (shape.rank // shape.heads) ** -0.5
    into = (down * temperature).mT
    if shape.eps is not None:
        into = torch.cat([into, out], dim=-2)
        into = into - into.mean(dim=-1, keepdim=True)
    into, out = into.flatten(1, 2), out.flatten(1, 2)
    into = into[:, : into.shape[1] - shape.own_rows]
    row = torch.arange(into.shape[1], device=into.device)
    column = torch.arange(out.shape[1], device=into.device)
    # A module's own A_O rows come after it: its step of the variance needs them with the module's Z in them.
    after = (row[:, None] + shape.own_rows) // shape.stride > column // shape.width
    return Matrices(into=into, out=out, couple=into @ out.mT * after, shift=shift * temperature)
