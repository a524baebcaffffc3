"""Where features are made: what can change their last bits, recorded beside the recipe."""

from typing import Any

import timm
import torch

from coldtap.errors import StoreError
from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.version import __version__

COMPARED = ("device", "torch", "timm", "kernel", "batch_size")


def describe_environment(backbone: Backbone, batch_size: int) -> dict[str, Any]:
    """Device, library versions, batch size, and of a quantised backbone the kernel."""
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "coldtap": __version__,
        "batch_size": batch_size,
        **({"kernel": backbone.kernel.kernel.name} if backbone.kernel else {}),
    }


def require_same_environment(before: dict[str, Any], now: dict[str, Any], *, allow_mixed: bool) -> None:
    """Refuse to go on with a store in another environment, unless told that a mix is fine.

    Raises:
        StoreError: naming what differs; features of the two would differ in their last bits.
    """
    changed = [f"{key}: {before.get(key)} → {now.get(key)}" for key in COMPARED if before.get(key) != now.get(key)]
    if changed and not allow_mixed:
        same = " with the same `kernel`" if "kernel" in before else ""
        raise StoreError(
            f"the store was begun elsewhere ({'; '.join(changed)}), and features would differ in their last bits: "
            f"go on there{same}, or accept a mix with `allow_mixed` (each block records where it was made)"
        )
