"""Groups of LSA modules as one function, whose backward pass keeps their rank-r outputs Z and nothing else.

The input of group i is a sum of taps, which are in memory anyway, plus all Z A_O before it. So keeping every Z is
enough to have every input again, in the very bits of the forward pass: no (batch, token, channel) tensor is kept, and
nothing is had by undoing a sum. The batch is done in parts of a few samples: what is large lives for one part only, and
stays in the processor's cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coldtap.adaptors.networks.lsa.attention import LowRankAttention
from coldtap.adaptors.networks.lsa.group import group_gradient, run_group
from coldtap.adaptors.networks.lsa.matrices import LsaShape, Matrices, fold

# Bytes of one (sample, token, channel) tensor of a part. Measured on a CPU (docs/methods.md); a GPU wants enough work
# for all its processors (chosen without a measurement).
CPU_PART_BYTES = 5_000_000
GPU_PART_BYTES = 128_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What the groups are fed: `lead` taps are summed before the first group, one more before every other.

    With `corrected` the result is the last tap and all increments, else the sum of all taps and all increments.
    `entry_eps` is None where the first tap is taken without a norm.
    """

    lead: int
    corrected: bool
    entry_eps: float | None


def can_run_groups(features: torch.Tensor) -> bool:
    """Say whether `run_groups` may be used; if not, the modules must be called one after another.

    It may not under a transform of `torch.func`, in an export, or where the features themselves want a gradient.
    """
    # What torch.autograd.Function itself asks before it is applied; torch has no public name for it.
    transformed = torch._C._are_functorch_transforms_active()
    return not (transformed or torch.compiler.is_compiling() or features.requires_grad)


def run_groups(
    groups: Sequence[nn.Module],
    taps: torch.Tensor,
    *,
    lead: int,
    corrected: bool,
    entry: nn.LayerNorm | None = None,
) -> torch.Tensor:
    """Run groups of equally built LSA modules over sums of taps.

    Group i, counted from 0, gets z_0 + … + z_{lead + i - 1} plus all increments before it. Kept for the backward pass
    are the modules' outputs Z, (batch, token, rank) each, one number a token more with biases, and the noise where
    modules drop something: as much again for dropout, a number a sample for drop-path.

    Args:
        groups: Rows of `LowRankAttention`, equally long, all modules of the same options.
        taps: (batch, tap, token, channel); they get no gradient.
        lead: Taps that are summed before the first group.
        corrected: Whether the result is the last tap plus increments, not the sum of all taps plus increments.
        entry: A norm of z_0.

    Returns:
        (batch, token, channel).
    """
    modules = [cast(LowRankAttention, module) for group in groups for module in cast(nn.Sequential, group)]
    first = modules[0]
    shape = LsaShape(
        groups=len(groups),
        modules=len(modules) // len(groups),
        rank=first.rank,
        heads=first.heads,
        scale=first.scale,
        biased=first.up_bias is not None,
        eps=first.norm.eps if isinstance(first.norm, nn.LayerNorm) else None,
    )
    sums = Sums(lead=lead, corrected=corrected, entry_eps=None if entry is None else entry.eps)
    # By attribute: torch.func.functional_call puts plain tensors in the place of parameters.
    of_modules = [attrgetter(name)(module) for name in shape.names for module in modules]
    of_entry = [] if entry is None else [entry.weight, entry.bias]
    result: torch.Tensor = _Groups.apply(shape, sums, taps, _draw_noise(shape, modules, taps), *of_modules, *of_entry)
    return result


def _draw_noise(shape: LsaShape, modules: Sequence[LowRankAttention], taps: torch.Tensor) -> torch.Tensor | None:
    """What each module would draw, in its order: (group, module, rank or 1, batch, token or 1), or None."""
    batch, _, tokens, _ = taps.shape
    drawn = (module.draw_noise(taps.new_empty(batch, tokens, module.rank)) for module in modules)
    found = [noise.permute(2, 0, 1) for noise in drawn if noise is not None]
    return torch.stack(found).unflatten(0, (shape.groups, -1)) if found else None


class _Groups(torch.autograd.Function):
    """The groups, part by part of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        shape: LsaShape,
        sums: Sums,
        taps: torch.Tensor,
        noise: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        matrices = fold(shape, parameters)
        batch, _, tokens, channels = taps.shape
        kept = taps.new_empty(shape.groups, shape.modules * shape.width, batch, tokens)
        result = taps.new_empty(batch, tokens, channels)
        for rows in _parts(taps):
            part = Part(shape, sums, taps[rows], noise, kept, rows, parameters)
            summed, increment = part.first(), taps.new_zeros(part.z.shape[2], channels)
            for i in range(shape.groups):
                part.add_taps(summed, i)
                x, variance = _centred(shape, summed + increment)
                run_group(shape, matrices.of_group(i), x, variance, part.noise[i], part.z[i], tokens=tokens)
                increment.addmm_(part.z[i].T, matrices.out[i])
            part.add_taps(summed, shape.groups)
            base = taps[rows, -1] if sums.corrected else summed.view(-1, tokens, channels)
            torch.add(base, increment.view(-1, tokens, channels), out=result[rows])
        ctx.shape, ctx.sums = shape, sums
        ctx.save_for_backward(taps, noise, kept, *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape, sums = ctx.shape, ctx.sums
        taps, noise, kept, *parameters = ctx.saved_tensors
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        with torch.enable_grad():
            folded = fold(shape, leaves)
        matrices = Matrices(*(matrix.detach() for matrix in folded))
        d_matrices = Matrices(*(torch.zeros_like(matrix) for matrix in matrices))
        d_entry = [torch.zeros_like(parameter) for parameter in parameters[shape.n_parameters :]]
        for rows in _parts(taps):
            part = Part(shape, sums, taps[rows], noise, kept, rows, leaves)
            part.add_gradient(matrices, d_matrices, d_entry, gradient[rows].flatten(0, 1).clone())
        # Without norm and biases nothing is added to Q, K and V: a shift of zeros that depends on no parameter.
        used = [i for i, matrix in enumerate(folded) if matrix.requires_grad]
        d_modules = torch.autograd.grad(
            [folded[i] for i in used], leaves[: shape.n_parameters], [d_matrices[i] for i in used]
        )
        return None, None, None, None, *d_modules, *d_entry


class Part:
    """A few samples on their way through the groups."""

    def __init__(
        self,
        shape: LsaShape,
        sums: Sums,
        taps: torch.Tensor,
        noise: torch.Tensor | None,
        kept: torch.Tensor,
        rows: slice,
        parameters: Sequence[torch.Tensor],
    ) -> None:
        self.shape, self.sums, self.taps = shape, sums, taps
        self.tokens, self.channels = taps.shape[2:]
        self.z = kept[:, :, rows].flatten(2)  # a view: (group, module · width, batch · token)
        self.noise: Sequence[torch.Tensor | None] = [None] * shape.groups
        if noise is not None:
            of_rows = noise[:, :, :, rows]
            self.noise = list(of_rows.expand(*of_rows.shape[:-1], self.tokens).flatten(3))
        self.entry = parameters[shape.n_parameters :]

    def first(self) -> torch.Tensor:
        """z_0, through the entry's norm if there is one: (batch · token, channel), to be added to."""
        first = self.taps[:, 0].flatten(0, 1)
        if self.sums.entry_eps is None:
            return first.clone()
        weight, bias = self.entry
        return F.layer_norm(first, (self.channels,), weight, bias, self.sums.entry_eps)

    def add_taps(self, summed: torch.Tensor, group: int) -> None:
        """Add the taps that come in before a group, counted from 0; after the last, what is left."""
        last = self.sums.lead + group
        for tap in range(1 if group == 0 else last - 1, min(last, self.taps.shape[1])):
            summed.view(-1, self.tokens, self.channels).add_(self.taps[:, tap])

    def add_gradient(
        self, matrices: Matrices, d_matrices: Matrices, d_entry: Sequence[torch.Tensor], gradient: torch.Tensor
    ) -> None:
        """Go through the groups in reverse, and add to the gradients of the matrices and of the entry's norm.

        `gradient` is that of the part's result, (batch · token, channel), and is overwritten.
        """
        shape = self.shape
        inputs = self._inputs(matrices)
        for i in reversed(range(shape.groups)):
            x, variance = inputs.pop()
            z, of_group, d_of_group = self.z[i], matrices.of_group(i), d_matrices.of_group(i)
            d_z = of_group.out @ gradient.T
            d_of_group.out.addmm_(z, gradient)
            d_u, d_variance = group_gradient(
                shape, of_group, x, variance, self.noise[i], z, tokens=self.tokens, d_z=d_z, d_matrices=d_of_group
            )
            d_of_group.into.addmm_(d_u, x)
            if i or d_entry:
                gradient.addmm_(d_u.T, of_group.into)
                if d_variance is not None:
                    gradient.addcmul_(x, d_variance.unsqueeze(1), value=2 / self.channels)
        if d_entry:
            with torch.enable_grad():
                first = self.first()
            for total, each in zip(d_entry, torch.autograd.grad(first, self.entry, gradient), strict=True):
                total += each

    def _inputs(self, matrices: Matrices) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Every group's input again, from the taps and all Z."""
        with torch.no_grad():
            summed = self.first()
        increment = torch.zeros_like(summed)
        inputs = []
        for i in range(self.shape.groups):
            self.add_taps(summed, i)
            inputs.append(_centred(self.shape, summed + increment))
            if i + 1 < self.shape.groups:
                increment.addmm_(self.z[i].T, matrices.out[i])
        return inputs


def _centred(shape: LsaShape, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `run_group` wants of an input that may be overwritten."""
    if shape.eps is None:
        return x, None
    x -= x.mean(dim=1, keepdim=True)
    return x, torch.linalg.vector_norm(x, dim=1).square_().div_(x.shape[1]).add_(shape.eps)


def _parts(taps: torch.Tensor) -> Iterator[slice]:
    """Cut the batch into parts as equal as may be; their number depends on the shape alone."""
    batch, _, tokens, channels = taps.shape
    limit = CPU_PART_BYTES if taps.device.type == "cpu" else GPU_PART_BYTES
    n_parts = min(batch, -(-batch * tokens * channels * taps.element_size() // limit))
    for i in range(n_parts):
        yield slice(i * batch // n_parts, (i + 1) * batch // n_parts)
