"""Families of backbones that can be quantised: their units in order, their layers, and what stays float.

A unit is a part of the model that maps one tensor to the next: the stem, then each block. Compensation is fitted unit
by unit. ViT and DeiT are timm's `VisionTransformer` of plain blocks; ResNet is timm's `ResNet`, whose norms are folded
first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from coldtap.errors import ModelError

# A norm folded into a convolution, and a model put together of its units, may differ in rounding alone.
TOLERANCE = 1e-3
# What has weights and multiplies nothing by a matrix: float by nature.
ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, nn.GroupNorm, LayerScale, nn.PReLU)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a model.

    Attributes:
        name: of its module; the stem has none.
        run: from the model and the unit's input to its output. It takes the model so that one description serves the
            float model and its quantised copy.
    """

    name: str
    run: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        family: `vit` or `resnet`.
        units: in the order in which they run.
        layers: names of the linears and convolutions that can be quantised, in order.
        sites: patterns of those layers after which channel-wise compensation goes by default.
        norms_before: from a norm's name to the only layer that reads it.
        left_float: from a name to why it stays float.
    """

    family: str
    units: Sequence[Unit]
    layers: Sequence[str]
    sites: Sequence[str]
    norms_before: Mapping[str, str]
    left_float: Mapping[str, str]

    def output(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return what the last unit gives for images (batch, channel, height, width)."""
        x = images
        for unit in self.units:
            x = unit.run(model, x)
        return x

    def layers_of(self, unit: Unit) -> list[str]:
        """Return the layers of a unit, in order."""
        blocks = tuple(f"{one.name}." for one in self.units if one.name)
        if unit.name:
            return [name for name in self.layers if name.startswith(f"{unit.name}.")]
        return [name for name in self.layers if not name.startswith(blocks)]

    def choose_sites(self, patterns: Sequence[str]) -> list[str]:
        """Return the layers that match one of the patterns.

        Raises:
            ModelError: a pattern that matches no quantised layer: there is no scale to fold into.
        """
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in self.layers):
                raise ModelError(
                    f"site {pattern!r} cannot be folded: no quantised layer has that name. Layers are "
                    f"{', '.join(self.layers[:5])} …; `*` stands for any characters"
                )
        return [layer for layer in self.layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Return what a model is made of, its norms folded already.

    Raises:
        ModelError: it is of no family that can be quantised.
    """
    if isinstance(model, VisionTransformer):
        return _vit(model)
    if isinstance(model, ResNet):
        return _resnet(model)
    raise ModelError(
        f"{type(model).__name__} cannot be quantised yet: ViT and DeiT (timm's VisionTransformer) and ResNet can; "
        "extract its features in float"
    )


def _vit(model: VisionTransformer) -> Anatomy:
    others = {type(block).__name__ for block in model.blocks if type(block) is not Block}
    if others:
        raise ModelError(f"ViT blocks of type {', '.join(sorted(others))} cannot be quantised yet: extract in float")
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    layers, left_float = _sort(model, outside=("norm", "fc_norm", "head", "head_dist", "head_drop", "attn_pool"))
    norms = {
        f"{block}.{norm}": f"{block}.{layer}"
        for block in blocks
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
        if f"{block}.{layer}" in layers and _only_reader(model.get_submodule(block), norm)
    }
    return Anatomy(
        family="vit",
        units=[Unit(name="", run=_vit_stem), *(Unit(name=block, run=_block(block)) for block in blocks)],
        layers=layers,
        sites=("blocks.*.attn.proj", "blocks.*.mlp.fc2"),
        norms_before=norms,
        left_float={**left_float, "softmax and attention products": "they are no layers of weights"},
    )


def _only_reader(block: nn.Module, norm: str) -> bool:
    """Whether a layer norm's output goes into one linear alone."""
    module = block.get_submodule(norm)
    gated = norm == "norm1" and getattr(block.get_submodule("attn"), "gate", None) is not None
    plain = norm == "norm1" or type(block.get_submodule("mlp")) is Mlp
    return isinstance(module, nn.LayerNorm) and module.weight is not None and plain and not gated


def _vit_stem(model: VisionTransformer, images: Tensor) -> Tensor:
    """z0 of images (batch, channel, height, width)."""
    tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    return tokens


def _block(name: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model.get_submodule(name)(x)
        return y

    return run


def _resnet(model: ResNet) -> Anatomy:
    blocks = [
        f"layer{stage}.{i}"
        for stage in range(1, 5)
        for i in range(len(model.get_submodule(f"layer{stage}")))  # type: ignore[arg-type]
    ]
    others = {type(model.get_submodule(name)).__name__ for name in blocks} - {BasicBlock.__name__, Bottleneck.__name__}
    if others:
        raise ModelError(f"ResNet blocks of type {', '.join(sorted(others))} cannot be quantised yet: extract in float")
    layers, left_float = _sort(model, outside=("fc", "global_pool"))
    return Anatomy(
        family="resnet",
        units=[Unit(name="", run=_resnet_stem), *(Unit(name=block, run=_block(block)) for block in blocks)],
        layers=layers,
        sites=("*conv*", "*downsample*"),
        norms_before={},
        left_float=left_float,
    )


def _resnet_stem(model: ResNet, images: Tensor) -> Tensor:
    """What the first residual block reads."""
    maps: Tensor = model.maxpool(model.act1(model.bn1(model.conv1(images))))
    return maps


def _sort(model: nn.Module, outside: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Layers that can be quantised, and what else has weights; what no tap needs is neither."""
    layers, left_float = [], {}
    for name, module in model.named_modules():
        if name.split(".")[0] in outside or not any(True for _ in module.parameters(recurse=False)):
            continue
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and _is_plain(module)):
            layers.append(name)
        elif type(module) is nn.Conv2d:
            left_float[name] = "a grouped, depthwise or otherwise padded convolution"
        elif name and not isinstance(module, ELEMENTWISE):
            left_float[name] = f"{type(module).__name__} is not handled"
    return layers, left_float


def _is_plain(convolution: nn.Conv2d) -> bool:
    return convolution.groups == 1 and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def fold_norms(model: nn.Module) -> None:
    """Fold each batch norm that follows a convolution into it, in place; the norm's place is kept by an identity.

    The convolution may be the last of a sequence, as in a deep stem.
    """
    for parent in list(model.modules()):
        for (name, layer), (norm_name, norm) in pairwise(list(parent.named_children())):
            holder = parent
            if isinstance(layer, nn.Sequential) and len(layer):
                holder, (name, layer) = layer, list(layer.named_children())[-1]
            if isinstance(layer, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
                setattr(holder, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, norm_name, nn.Identity())


def require_same_taps(taps: Sequence[Tensor], others: Sequence[Tensor], what: str) -> None:
    """Hold the taps of a model that was taken apart against its own.

    Raises:
        ModelError: they differ by more than rounding: the model does more than its family does.
    """
    for i, (tap, other) in enumerate(zip(taps, others, strict=True)):
        difference = float((tap - other).abs().max() / tap.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{what}: tap {i} is then another (by {difference:.2g} of its largest value): this variant of the "
                "model cannot be quantised yet; extract in float"
            )
