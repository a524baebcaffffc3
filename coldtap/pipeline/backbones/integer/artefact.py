"""The artefact: a quantised backbone as one safetensors file, which needs no float weights beside it.

Tensors: `codes/LAYER` (packed, `packing`), `weight_scale/LAYER`, `bias/LAYER`, `cwac.scale/LAYER`, `cwac.offset/LAYER`,
`qwt.weight/BLOCK`, `qwt.bias/BLOCK`, and under `float/` what stays float, by its name in the model. The metadata's key
`coldtap` holds all else as JSON (docs/quantisation.md).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from coldtap.errors import CorruptStoreError, ModelError
from coldtap.pipeline.backbones.integer.layers import QuantisedLayer, quantised_layers
from coldtap.pipeline.backbones.integer.linear_compensation import LinearCompensation, add_to_block
from coldtap.pipeline.backbones.integer.packing import pack, unpack
from coldtap.pipeline.backbones.integer.product import Window
from coldtap.pipeline.backbones.integer.ranges import ActivationRange
from coldtap.pipeline.backbones.integer.scheme import Scheme
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.stores.compensation.channel_affine import ChannelAffine
from coldtap.stores.format.canonical import parse_json, safetensors_header, sha256
from coldtap.stores.format.fields import require_types
from coldtap.stores.storage.local import LocalStorage

FORMAT = 1
KEY = "coldtap"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What an artefact says of itself.

    Attributes:
        model: what `load_backbone` builds; None for a module from Python, which has to be given.
        architecture: of the backbone.
        backbone: SHA-256 of its float32 weights.
        preprocess: of the calibration, and so of the extraction.
        scheme: name of the scheme; layers carry their own bits.
        compensation: none, qwt or cwac.
        settings: how ranges and compensation were made.
        calibration: digest of the images, their number, and the seed that chose them.
        left_float: from the name of what stays float to the reason.
    """

    model: str | None
    architecture: str
    backbone: str
    preprocess: Mapping[str, Any]
    scheme: str
    compensation: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    left_float: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A quantised backbone in a file.

    Attributes:
        about: what it says of itself.
        digest: SHA-256 of the file.
        n_bytes: its size.
        tensors: by name.
        layers: from a layer's name to its bits, input range and window.
        strides: from the name of a block with QwT to its stride.
    """

    about: About
    digest: str
    n_bytes: int
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Mapping[str, Any]]
    strides: Mapping[str, int]

    def identity(self) -> dict[str, str]:
        """Return what a recipe says of it: features of two artefacts never stand in for each other."""
        return {"scheme": self.about.scheme, "compensation": self.about.compensation, "artefact": self.digest}

    @property
    def preprocess(self) -> Preprocess:
        """How images become the backbone's input."""
        return Preprocess.from_dict(self.about.preprocess)


def write_artefact(path: Path, model: nn.Module, about: About) -> str:
    """Write a quantised model, whole or not at all.

    Returns:
        SHA-256 of the file.

    Raises:
        MachineError: the disk is full or refuses.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in quantised_layers(model).items():
        layers[name] = {
            "scheme": str(layer.scheme),
            "shape": list(layer.codes.shape),
            "input_scale": layer.input.scale,
            "input_zero": layer.input.zero,
            "window": layer.window and asdict(layer.window),
        }
        tensors[f"codes/{name}"] = pack(layer.codes.cpu(), layer.scheme.weight_bits)
        tensors[f"weight_scale/{name}"] = layer.weight_scale
        if layer.bias is not None:
            tensors[f"bias/{name}"] = layer.bias
        if layer.affine is not None:
            tensors[f"cwac.scale/{name}"] = torch.from_numpy(layer.affine.scale.astype(np.float32))
            tensors[f"cwac.offset/{name}"] = torch.from_numpy(layer.affine.offset.astype(np.float32))
    strides = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearCompensation):
            block = name.removesuffix(".qwt")
            strides[block] = module.stride
            tensors[f"qwt.weight/{block}"], tensors[f"qwt.bias/{block}"] = module.weight, module.bias
    for name, value in model.state_dict().items():
        if not name.rpartition(".")[0].endswith(".qwt"):
            tensors[f"float/{name}"] = value
    said = {"format": FORMAT, **asdict(about), "layers": layers, "qwt_strides": strides}
    metadata = {KEY: json.dumps(said, sort_keys=True, separators=(",", ":"))}
    data = save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    LocalStorage(path.parent).put(path.name, [data])
    return sha256(data)


def read_artefact(path: Path) -> Artefact:
    """Read an artefact.

    Raises:
        ModelError: there is no such file, or it is none that this version reads.
    """
    try:
        data = LocalStorage(path.parent).get(path.name, limit=None)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; `coldtap quantize` makes one") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except CorruptStoreError as error:
        raise ModelError(f"{error}: give a file of `coldtap quantize`") from error
    try:
        tensors = load_tensors(data)
        said = parse_json(safetensors_header(data)["__metadata__"][KEY])
        if (found := said.pop("format")) != FORMAT:
            raise ModelError(f"{path} has format {found}; this version of coldtap reads {FORMAT}")
        layers, strides, about = said.pop("layers"), said.pop("qwt_strides"), require_types(About(**said))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no artefact of `coldtap quantize` ({type(error).__name__}: {error})") from error
    return Artefact(
        about=about, digest=sha256(data), n_bytes=len(data), tensors=tensors, layers=layers, strides=strides
    )


def restore_into(model: nn.Module, artefact: Artefact, path: Path) -> None:
    """Make a float model of the same architecture, its norms folded, the artefact's, in place.

    Raises:
        ModelError: the artefact is of another architecture.
    """
    try:
        for name, said in artefact.layers.items():
            model.get_submodule(name)
            model.set_submodule(name, _layer(name, said, artefact.tensors))
        for block, stride in artefact.strides.items():
            weight, bias = (artefact.tensors[f"qwt.{part}/{block}"] for part in ("weight", "bias"))
            add_to_block(model.get_submodule(block), LinearCompensation(weight, bias, stride))
        rest = {
            key.removeprefix("float/"): value for key, value in artefact.tensors.items() if key.startswith("float/")
        }
        own = {name for name in model.state_dict() if not name.rpartition(".")[0].endswith(".qwt")}
        if odd := own - set(rest):
            raise ModelError(f"it lacks {min(odd)}")
        for name, value in rest.items():
            _set(model, name, value)
    except (ModelError, AttributeError, KeyError, ValueError) as error:
        raise ModelError(
            f"{path} is of {artefact.about.architecture} and does not fit {type(model).__name__} "
            f"({error}): give the model that it was made of"
        ) from error


def _layer(name: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantisedLayer:
    scheme = Scheme.parse(said["scheme"])
    window = said["window"]
    layer = QuantisedLayer(
        codes=unpack(tensors[f"codes/{name}"], scheme.weight_bits, tuple(said["shape"])),
        weight_scale=tensors[f"weight_scale/{name}"],
        bias=tensors.get(f"bias/{name}"),
        input=ActivationRange(scale=said["input_scale"], zero=said["input_zero"]),
        scheme=scheme,
        window=window and Window(**{key: (pair[0], pair[1]) for key, pair in window.items()}),
    )
    if (scale := tensors.get(f"cwac.scale/{name}")) is not None:
        offset = tensors[f"cwac.offset/{name}"]
        layer.compensate(ChannelAffine(scale=scale.double().numpy(), offset=offset.double().numpy()))
    return layer


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer its value; a norm that was reparameterised may have a bias that it had not."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    before = getattr(module, leaf)
    if before is not None and before.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(before.shape)}, there {tuple(value.shape)}")
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
