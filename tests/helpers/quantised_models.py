"""Small backbones of every family that is quantised, with calibration images, for tests."""

from collections.abc import Callable
from dataclasses import replace

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.backbones.integer.scheme import SchemeByLayer
from coldtap.pipeline.backbones.taps import read_taps_of
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.quantisation.compensation.site_table import level_db
from coldtap.pipeline.quantisation.ptq.model import QuantisedModel, quantise, rows_of
from coldtap.stores.compensation.channel_affine import ChannelMoments

SIDE = 32
HOW = Preprocess(
    height=SIDE,
    width=SIDE,
    crop_pct=1.0,
    crop_mode="squash",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def _trained(model: nn.Module) -> nn.Module:
    """Norms and biases as training leaves them, not at 1 and 0."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.ndim == 1 and value.dtype == torch.float32:
                spread = torch.rand(value.shape, generator=noise)
                value.copy_(spread + 0.5 if name.endswith(("weight", "var", "gamma")) else 0.4 * (spread - 0.5))
    return model.eval()


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    layout = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    return _trained(VisionTransformer(**{**layout, **options}))


def deit() -> nn.Module:
    torch.manual_seed(0)
    return _trained(
        VisionTransformerDistilled(
            img_size=SIDE, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, qkv_bias=False
        )
    )


def resnet(block: type[nn.Module] = BasicBlock, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return _trained(ResNet(block, (1, 1, 1, 1), channels=(8, 16, 24, 32), num_classes=0, **options))


def bottleneck_resnet() -> nn.Module:
    return resnet(Bottleneck)


def deep_stem_resnet() -> nn.Module:
    torch.manual_seed(0)
    return _trained(timm.create_model("resnet14t", num_classes=0))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit-layer-scale": lambda: vit(init_values=0.1, class_token=True, reg_tokens=2),
    "deit": deit,
    "resnet": resnet,
    "resnet-bottleneck": bottleneck_resnet,
    "resnet-deep-stem": deep_stem_resnet,
}


def backbone_of(module: nn.Module) -> Backbone:
    return load_backbone(module, preprocess=HOW, device="cpu")


def pixels(n: int = 32, seed: int = 0) -> Tensor:
    """Smooth random images, uint8 (n, 3, side, side)."""
    noise = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=noise)
    fine = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
    return (fine.clamp(0, 1) * 255).to(torch.uint8)


def quantised(
    module: nn.Module, scheme: str = "w8a8", *, reparameterised: bool = True, **overrides: str
) -> QuantisedModel:
    return quantise(
        backbone_of(module),
        list(pixels().split(8)),
        SchemeByLayer.parse(scheme, [f"{name}={bits}" for name, bits in overrides.items()]),
        ranges="least-squares",
        reparameterised=reparameterised,
        seed=0,
    )


def taps_of(module: nn.Module, images: Tensor, like: Backbone) -> list[Tensor]:
    """All taps of a module that has a backbone's preprocessing."""
    return replace(like, module=module, taps=read_taps_of(module, None, 0))(images)


def snr_db(wanted: Tensor, got: Tensor) -> float:
    """As `diagnose` has it: what differs between channels alone is no signal."""
    return level_db(ChannelMoments.of(rows_of(got).cpu(), rows_of(wanted).cpu()))


def closeness_db(wanted: Tensor, got: Tensor) -> float:
    """With all that is wanted as signal: late maps of a random network differ between channels, hardly within them."""
    return float(10 * torch.log10(wanted.var(unbiased=False) / (wanted - got).square().mean()))
