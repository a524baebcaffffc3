"""Taps: where a backbone's intermediate features are taken, and how they come out of a forward pass.

For a token backbone (ViT, DeiT, DINOv2, …) z0 is the input of the first block and zi the output of the i-th.
For a stage backbone (Swin, ConvNeXt, ResNet, …) the taps are the feature maps that timm gives. From Python,
any module's named submodules can be taps. Every tap comes as one tensor (batch, token, channel), prefix tokens
first, then the grid in row-major order.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coldtap.errors import ModelError
from coldtap.stores.format.geometry import Geometry


class TapReader(Protocol):
    """Runs a backbone and hands out its taps.

    `stages` says that the taps are feature maps of stages, not the residual stream z0 … zN: they have no sum.
    """

    stages: bool

    def names(self) -> list[str]:
        """Return the name of each tap, in order."""

    def grids(self, images: Tensor) -> list[tuple[tuple[int, int], int]]:
        """Return the grid (height, width) and the prefix tokens of each tap, from a forward pass."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Each tap of images (batch, channel, height, width), as (batch, token, channel)."""


def read_taps_of(model: nn.Module, names: Sequence[str] | None, prefix_tokens: int) -> TapReader:
    """Return the tap reader that fits a model.

    Args:
        model: a timm model, or any module if `names` are given.
        names: names of submodules, as `named_modules` gives them.
        prefix_tokens: tokens before the grid in the outputs of named taps of three axes.

    Raises:
        ModelError: no submodule of a name, or a model without taps that coldtap knows.
    """
    if names is not None:
        return NamedTaps(model, names, prefix_tokens)
    forward = getattr(model, "forward_intermediates", None)
    if type(model).__name__ == "NaFlexVit":
        raise ModelError(
            "NaFlex backbones give a varying number of tokens, which store format 1 does not hold: "
            "use a model of a fixed input size"
        )
    if forward is None:
        raise ModelError(
            f"{type(model).__name__} has no forward_intermediates: name its taps (`tap_names=[...]` from Python) "
            "or use another model"
        )
    if "return_prefix_tokens" in inspect.signature(forward).parameters and hasattr(model, "blocks"):
        return TokenTaps(model)
    return StageTaps(model)


class TokenTaps:
    """z0 … zN of a timm model with `blocks`."""

    stages = False

    def __init__(self, model: Any) -> None:
        self._model = model

    def names(self) -> list[str]:
        """Return `z0` … `zN`."""
        return [f"z{i}" for i in range(len(self._model.blocks) + 1)]

    def grids(self, images: Tensor) -> list[tuple[tuple[int, int], int]]:
        """Give every tap the patch grid and the model's prefix tokens."""
        maps = self._model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
        height, width = maps[-1].shape[-2:]
        return [((height, width), int(self._model.num_prefix_tokens))] * (len(maps) + 1)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The input of the first block by a hook, the outputs of the blocks by `forward_intermediates`."""
        first: list[Tensor] = []
        handle = self._model.blocks[0].register_forward_pre_hook(lambda _, inputs: first.append(inputs[0]))
        try:
            taps = self._model.forward_intermediates(
                images, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
        finally:
            handle.remove()
        return [first[0], *(_whole(*reversed(tap)) if isinstance(tap, tuple) else tap for tap in taps)]


def _whole(prefix: Tensor, patches: Tensor) -> Tensor:
    """Prefix and patch tokens as one tensor (batch, token, channel).

    timm slices both out of one tensor; where they still lie side by side, that tensor is given back without a copy.
    """
    batch, n_prefix, channels = prefix.shape
    side_by_side = (
        prefix.untyped_storage().data_ptr() == patches.untyped_storage().data_ptr()
        and prefix.stride() == patches.stride()
        and patches.storage_offset() == prefix.storage_offset() + n_prefix * prefix.stride(1)
    )
    if not side_by_side:
        return torch.cat([prefix, patches], dim=1)
    return prefix.as_strided((batch, n_prefix + patches.shape[1], channels), prefix.stride())


class StageTaps:
    """The feature maps of a timm stage network, numbered from 0."""

    stages = True

    def __init__(self, model: Any) -> None:
        self._model = model

    def names(self) -> list[str]:
        """Return `stage0`, `stage1`, …: timm's own order."""
        return [f"stage{i}" for i in range(len(self._model.feature_info))]

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self._model.forward_intermediates(images, norm=False, intermediates_only=True)
        return maps

    def grids(self, images: Tensor) -> list[tuple[tuple[int, int], int]]:
        """Give each stage a grid of its own, and no prefix tokens."""
        return [((stage.shape[-2], stage.shape[-1]), 0) for stage in self._maps(images)]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Each map with its grid unrolled."""
        return [_unrolled(stage) for stage in self._maps(images)]


class NamedTaps:
    """Outputs of named submodules of any module: (batch, token, channel) or (batch, channel, height, width)."""

    stages = False

    def __init__(self, model: nn.Module, names: Sequence[str], prefix_tokens: int) -> None:
        modules = dict(model.named_modules())
        if unknown := [name for name in names if name not in modules or not name]:
            known = [name for name in modules if name.count(".") < 2 and name]
            raise ModelError(f"the model has no submodule {unknown[0]!r}; it has {', '.join(known[:12])} …")
        self._model = model
        self._names = list(names)
        self._modules = [modules[name] for name in names]
        self._prefix_tokens = prefix_tokens

    def names(self) -> list[str]:
        """Return the names as given."""
        return list(self._names)

    def _outputs(self, images: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def keep(position: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                found[position] = output.clone()

            return hook

        handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(self._modules)]
        try:
            self._model(images)
        finally:
            for handle in handles:
                handle.remove()
        if missing := [name for i, name in enumerate(self._names) if i not in found]:
            raise ModelError(f"the tap {missing[0]!r} is not reached by a forward pass of the model")
        return [found[i] for i in range(len(self._names))]

    def grids(self, images: Tensor) -> list[tuple[tuple[int, int], int]]:
        """Read the outputs' axes; tokens of three axes must form a square grid behind the prefix tokens."""
        grids = []
        for name, output in zip(self._names, self._outputs(images), strict=True):
            if output.ndim == 4:
                grids.append(((output.shape[2], output.shape[3]), 0))
                continue
            side = round((output.shape[1] - self._prefix_tokens) ** 0.5) if output.ndim == 3 else -1
            if side**2 + self._prefix_tokens != output.shape[1]:
                raise ModelError(
                    f"the tap {name!r} gives {tuple(output.shape)}: expected (batch, channel, height, width), or "
                    f"(batch, token, channel) with {self._prefix_tokens} prefix tokens and a square grid"
                )
            grids.append(((side, side), self._prefix_tokens))
        return grids

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The outputs, maps with their grid unrolled."""
        return [_unrolled(output) if output.ndim == 4 else output for output in self._outputs(images)]


def _unrolled(maps: Tensor) -> Tensor:
    """(batch, channel, height, width) as contiguous (batch, token, channel)."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def geometries_of(reader: TapReader, images: Tensor) -> dict[int, Geometry]:
    """Return the geometry of each tap, by its index, from one forward pass."""
    return {
        index: Geometry(grid=grid, prefix_tokens=prefix, channels=tap.shape[2])
        for index, ((grid, prefix), tap) in enumerate(zip(reader.grids(images), reader(images), strict=True))
    }
