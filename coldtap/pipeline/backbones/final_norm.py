"""The backbone's final norm, taken out as data so that adaptors can use it without the backbone."""

import numpy as np
from torch import Tensor, nn

from coldtap.stores.format.norm import FinalNorm

# Where timm keeps it: `norm` before pooling; `fc_norm` or `head.norm` where the model norms after pooling.
PLACES = ("norm", "fc_norm", "head.norm")


def final_norm(model: nn.Module) -> FinalNorm | None:
    """Return the final norm over channels, or None where there is none (ResNet) or it is of another kind."""
    modules = dict(model.named_modules())
    for place in PLACES:
        norm = modules.get(place)
        if norm is None or isinstance(norm, nn.Identity):
            continue
        if isinstance(norm, nn.LayerNorm):
            return FinalNorm(kind="layer_norm", eps=norm.eps, weight=_values(norm.weight), bias=_values(norm.bias))
        if "rms" in type(norm).__name__.lower() and hasattr(norm, "eps"):
            return FinalNorm(kind="rms_norm", eps=float(norm.eps), weight=_values(norm.weight), bias=None)
    return None


def _values(parameter: Tensor | None) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    return None if parameter is None else parameter.detach().float().cpu().numpy()
