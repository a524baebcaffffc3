"""From an artefact to the quantised model that it holds."""

import copy
from pathlib import Path

from torch import nn

from coldtap.errors import ModelError
from coldtap.pipeline.backbones.integer.artefact import Artefact, restore_into
from coldtap.pipeline.backbones.integer.families import fold_norms
from coldtap.pipeline.backbones.reference import ARCHITECTURE as REFERENCE
from coldtap.pipeline.backbones.weights import create_timm_model, require_no_place, weights_digest


def build_quantised(artefact: Artefact, path: Path, model: str | nn.Module | None) -> nn.Module:
    """Build the model of an artefact, in eval mode; no float weights are fetched.

    Args:
        artefact: that was read from `path`.
        path: for messages.
        model: what the caller takes it to be of: None for whatever it says; a module must be the one it was made of.

    Raises:
        ModelError: the artefact is of another backbone.
    """
    about = artefact.about
    if isinstance(model, nn.Module):
        module = copy.deepcopy(model).eval()
        if (digest := weights_digest(module)) != about.backbone:
            raise ModelError(
                f"{path} is of a backbone with weights {about.backbone[:12]}…, and the module that was "
                f"given has {digest[:12]}…: give the one that it was made of"
            )
    elif about.model is None:
        raise ModelError(f"{path} was made of a module from Python ({about.architecture}): give it as `model`")
    else:
        if model not in (None, about.model, about.architecture):
            raise ModelError(
                f"{path} is of {about.model}, and `{model=}` was asked for: leave `model` out, or quantise that one"
            )
        if model is None:
            require_no_place(about.model, str(path))
        size = (artefact.preprocess.height, artefact.preprocess.width)
        module = create_timm_model(about.model, random_weights=about.model != REFERENCE, input_size=size)
    fold_norms(module)
    restore_into(module, artefact, path)
    return module
