"""Weights: where they come from, and the digest by which a backbone is known."""

import difflib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.backbones.reference import ARCHITECTURE as REFERENCE
from coldtap.pipeline.backbones.reference import build_reference

# What timm takes for a place and not for the name of an architecture.
PLACES = ("hf-hub:", "hf_hub:", "local-dir:")


def create_timm_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    input_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Create a timm model in eval mode, without its classifier.

    Args:
        name: a timm model name, with or without its pretrained tag, or `coldtap/vit-reference`.
        checkpoint: local weights instead of the pretrained ones: safetensors, or a state dict that torch
            loads with `weights_only`.
        random_weights: leave the weights as timm initialises them, for measurements and tests.
        input_size: (height, width) of the input in pixels, for models whose token grid depends on it.

    Raises:
        ModelError: unknown name; weights that cannot be had, are damaged or belong to another architecture.
        OptionError: both a checkpoint and random weights.
    """
    if checkpoint is not None and random_weights:
        raise OptionError("`checkpoint` and `random_weights` exclude each other: give one of them")
    if name == REFERENCE and checkpoint is None and not random_weights:
        if input_size not in (None, (32, 32)):
            raise OptionError(f"{REFERENCE} takes images of 32 × 32 pixels; {input_size} was asked for")
        model: nn.Module = build_reference()
    elif name == REFERENCE:
        raise OptionError(f"{REFERENCE} comes with its weights: leave out `checkpoint` and `random_weights`")
    else:
        model = _create(name, pretrained=checkpoint is None and not random_weights, input_size=input_size)
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(0)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, name)
    return model.eval()


def require_no_place(name: str, where: str) -> None:
    """Refuse a name of a model from a file where it leads to a hub or to a folder.

    Raises:
        ModelError: it does.
    """
    if name.startswith(PLACES):
        raise ModelError(
            f"{where} names the model {name!r}, which lies elsewhere; nothing was fetched. {_repeat(name)}"
        )


def cached_weights(name: str, where: str) -> Path | None:
    """Return the file with the pretrained weights of a model that a file names, from this machine's caches.

    No network is asked: timm's own way would, even for what is cached.

    Args:
        name: what `create_timm_model` takes.
        where: the file that gives the name, for messages.

    Returns:
        None where the weights come with coldtap, or there is no such model.

    Raises:
        ModelError: the weights are in no cache, or the name leads to a hub or to a folder.
    """
    if name == REFERENCE or not (name.startswith(PLACES) or timm.is_model(name)):
        return None
    require_no_place(name, where)
    for path in _cache_places(name):
        if path.is_file():
            return path
    raise ModelError(
        f"{where} names the model {name!r}, whose weights are not in this machine's cache; nothing was fetched. "
        f"{_repeat(name)}, or give local weights with `checkpoint=FILE`"
    )


def _repeat(name: str) -> str:
    return f"If you trust it, name it yourself: `model={name!r}`"


def _cache_places(name: str) -> Iterator[Path]:
    """Where timm, by way of huggingface_hub or torch.hub, keeps a model's weights."""
    from huggingface_hub import try_to_load_from_cache

    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        return
    if known.hf_hub_id:
        for file in (known.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
            found = try_to_load_from_cache(known.hf_hub_id, file) if file else None
            if isinstance(found, str):
                yield Path(found)
    if isinstance(known.url, str) and known.url:
        yield Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlsplit(known.url).path).name


def _create(name: str, *, pretrained: bool, input_size: tuple[int, int] | None) -> nn.Module:
    if not name.startswith(PLACES) and not timm.is_model(name):
        base = name.split(".")[0]
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ModelError(f"timm has no model {name!r}{hint}. `timm.list_models()` lists them; or use {REFERENCE}")
    arguments: dict[str, Any] = {} if input_size is None else {"img_size": input_size}
    try:
        torch.manual_seed(0)  # random weights are then the same in every run
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        if input_size is None:
            raise ModelError(f"timm cannot build {name}: {error}") from error
        # A network without a token grid takes any size; only its preprocessing changes.
        return _create(name, pretrained=pretrained, input_size=None)
    except Exception as error:  # hubs raise many kinds: HTTP, URL, OS and runtime errors
        if not pretrained:
            raise ModelError(f"timm cannot build {name}: {_first_line(error)}") from error
        raise ModelError(
            f"the pretrained weights of {name} cannot be had ({_first_line(error)}): check the network, or give "
            "local weights with `checkpoint=FILE`"
        ) from error
    return model


def load_checkpoint(model: nn.Module, path: Path, name: str) -> None:
    """Load local weights into a model without its classifier; nothing else may be missing or left over.

    Raises:
        ModelError: no such file, damaged, or of another architecture.
    """
    if not path.is_file():
        raise ModelError(f"`checkpoint={str(path)!r}`: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = adapt(state, model) if adapt else state
        result = model.load_state_dict(_without_classifier(state, model), strict=False)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise ModelError(f"`checkpoint={str(path)!r}` cannot be read: {_first_line(error)}") from error
        mismatch = str(error).splitlines()[1].strip()
        raise ModelError(f"`checkpoint={str(path)!r}` is of another architecture than {name}: {mismatch}") from error
    except Exception as error:  # unpickling and safetensors raise many kinds on damaged files
        raise ModelError(
            f"`checkpoint={str(path)!r}` cannot be read ({type(error).__name__}: {_first_line(error)}): give "
            "safetensors, or a state dict saved by torch.save"
        ) from error
    if result.missing_keys or result.unexpected_keys:
        raise ModelError(
            f"`checkpoint={str(path)!r}` is of another architecture than {name}: it lacks {_some(result.missing_keys)} "
            f"and has {_some(result.unexpected_keys)} besides"
        )


def _without_classifier(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    dropped = tuple(f"{name}." for name in (*names, "head.fc", "fc")) + tuple(
        f"{name}." for name in ("head", "head_dist") if not any(k.startswith("head.") for k in model.state_dict())
    )
    own = set(model.state_dict())
    return {key: value for key, value in state.items() if key in own or not key.startswith(dropped)}


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of a model's state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
