"""The reference backbone `coldtap/vit-reference`: a small ViT that needs no model hub.

Its weights are package data (`vit-reference.safetensors`, float16); `MODEL_CARD.md` beside them says what
they were trained on, how, and what they reach. `scripts/pretrain_reference.py` makes them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

from coldtap.errors import ModelError

ARCHITECTURE = "coldtap/vit-reference"

WEIGHTS = Path(__file__).with_name("vit-reference.safetensors")
WEIGHTS_SHA256 = "286a50540367d5c60c76830ef42c4cdd0f13bb1e3454b7bee4ae3edd3ab5da78"

LAYOUT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 192,
    "depth": 9,
    "num_heads": 3,
    "mlp_ratio": 2,
    "num_classes": 10,
}

# `squash` resizes the whole image to 32 x 32. `center` would cut the long side of the image away, and at
# 32 pixels what is cut costs more than a changed aspect ratio.
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "num_classes": 10,
}


def build_reference(weights: Path = WEIGHTS, layout: Mapping[str, Any] = LAYOUT) -> VisionTransformer:
    """Build the reference backbone with its packaged weights.

    Images of shape (batch, 3, 32, 32) give taps z0 … z9 of shape (batch, 65, 192): one class token, then an
    8 x 8 grid.

    Returns:
        A float32 model in eval mode. `timm.data.resolve_model_data_config` finds its preprocessing.

    Raises:
        ModelError: the packaged weights are missing, are not those of this version, or do not fit the layout.
    """
    state = _read_weights(weights, WEIGHTS_SHA256)
    model = VisionTransformer(**layout)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{weights}: the weights do not fit {ARCHITECTURE}: {error}") from error
    # timm keeps this dict on the module, whose type allows only tensors and modules.
    model.pretrained_cfg = dict(PRETRAINED_CFG)  # type: ignore[assignment]
    return model.eval()


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Read a float16 safetensors file whose digest must be `sha256`, as float32 tensors."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot read the weights of {ARCHITECTURE}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ModelError(
            f"{path}: sha256 is {found}, expected {sha256}: the weights of {ARCHITECTURE} are damaged or of "
            "another version; install coldtap again"
        )
    try:
        return {name: tensor.float() for name, tensor in load(content).items()}
    except SafetensorError as error:
        raise ModelError(f"{path}: not a safetensors file: {error}") from error
