"""A quantised backbone as one ONNX file, for devices that have neither torch nor coldtap.

The file has one input, `pixels`, uint8 (batch, channel, height, width): resized and cropped, and normalised inside. It
has one output per tap, by the tap's name, float32 (batch, token, channel), with a free batch axis. Its metadata carry
the extractor and its digest, which an exported adaptor names too.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coldtap.errors import ModelError, OptionError
from coldtap.extras import require_extra
from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.backbones.inputs import normalise
from coldtap.pipeline.backbones.integer.artefact import About, Artefact, read_artefact
from coldtap.pipeline.backbones.integer.families import anatomy_of
from coldtap.pipeline.backbones.integer.layers import quantised_layers
from coldtap.pipeline.backbones.integer.load import build_quantised
from coldtap.pipeline.backbones.taps import read_taps_of
from coldtap.pipeline.images.preprocess import N_CHANNELS, Preprocess
from coldtap.pipeline.quantisation.onnx.layer import OnnxLayer
from coldtap.stores.format.canonical import canonical_json, digest_of
from coldtap.stores.storage.atomic import write_file
from coldtap.stores.storage.output_place import require_place
from coldtap.version import __version__

OPSET = 20  # the first that has Gelu
INPUT = "pixels"
SCHEME = "w8a8"
# Share of a tap's largest value. Sums in another order flip codes at ties, and later layers carry it on: with random
# weights 0.018 was seen at ViT-B. A network that carries it further does so between coldtap's own kernels too, and is
# allowed some times what they differ by.
MAX_DIFFERENCE = 0.05
MAX_OF_KERNELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TapAgreement:
    """onnxruntime's taps beside coldtap's: the tap that differs most, and by which share of its largest value."""

    tap: str
    largest_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneExport:
    """A written ONNX file.

    Attributes:
        path: of the file.
        n_bytes: its size.
        about: what the artefact says of itself.
        n_layers: quantised layers in it.
        taps: names of the outputs, in order.
        input_shape: (channel, height, width) of the pixels.
        agreement: None where onnxruntime is not installed.
        was_there: the file was there already, the same.
    """

    path: Path
    n_bytes: int
    about: About
    n_layers: int
    taps: tuple[str, ...]
    input_shape: tuple[int, int, int]
    agreement: TapAgreement | None
    was_there: bool


def export_backbone(artefact: str | Path, out: str | Path, *, model: nn.Module | None = None) -> BackboneExport:
    """Write the quantised backbone of an artefact as one ONNX file: whole or not at all.

    Args:
        artefact: that `coldtap quantize` wrote, of w8a8; layers that were left in float stay float.
        out: the file. One with the same bytes is left as it is.
        model: that it was made of, if that was a module from Python.

    Raises:
        ModelError: it is no artefact, or of another model; a layer has other widths; the model cannot be exported.
        OptionError: `out` is a folder, lies in a file, or holds something else.
        MissingExtraError: a package of `coldtap[onnx]` is not installed.
        MachineError: the disk is full, read-only or refuses.
    """
    source, path = Path(artefact), Path(out)
    require_place(path, "backbone.onnx")
    require_extra("onnx", for_="export-backbone")
    read = read_artefact(source)
    _require_eight_bits(read, source)
    backbone = load_backbone(model, quantised=source, kernel="float", device="cpu")
    traced = PixelsToTaps(build_quantised(read, source, model), backbone.preprocess)
    data = backbone_bytes(traced, backbone, metadata_of(read.about, backbone))
    on_integers = load_backbone(model, quantised=source, kernel="int_mm", device="cpu")
    agreement = compare_taps(backbone, on_integers, data)
    was_there = path.exists()
    if not was_there:
        write_file(path, [data])
    elif path.read_bytes() != data:
        raise OptionError(f"{path} is there already and holds something else: choose another `out`, or delete it")
    return BackboneExport(
        path=path,
        n_bytes=len(data),
        about=read.about,
        n_layers=len(read.layers),
        taps=tuple(backbone.taps.names()),
        input_shape=(N_CHANNELS, backbone.preprocess.height, backbone.preprocess.width),
        agreement=agreement,
        was_there=was_there,
    )


def metadata_of(about: About, backbone: Backbone) -> dict[str, str]:
    """Return what an exported file says of itself: text by name, JSON where a value has parts."""
    extractor = backbone.extractor().to_dict()
    parts: dict[str, Any] = {"extractor": extractor, "calibration": dict(about.calibration)}
    return {
        "coldtap_version": __version__,
        "architecture": about.architecture,
        "scheme": about.scheme,
        "compensation": about.compensation,
        "extractor_digest": digest_of(extractor),
        "input": "uint8 (batch, channel, height, width), RGB, resized and cropped; mean and std are applied inside",
        "outputs": "the extractor's taps, by name and in its order: float32 (batch, token, channel)",
        **{name: canonical_json(value).decode() for name, value in parts.items()},
    }


class PixelsToTaps(nn.Module):
    """What is exported: a quantised model in eval mode, whose layers become ONNX nodes, with its preprocessing."""

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        for name, layer in quantised_layers(model).items():
            model.set_submodule(name, OnnxLayer(layer.product()))
        self.model, self._preprocess = model, preprocess
        self.eval()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Run (batch, channel, height, width) uint8, to (batch, token, channel) per tap."""
        images = normalise(pixels, self._preprocess, torch.float32)
        anatomy = anatomy_of(self.model)
        if anatomy.family != "vit":
            return read_taps_of(self.model, None, 0)(images)
        taps = [images]  # a ViT's reader looks where tensors lie in memory, and a trace has none
        for unit in anatomy.units:
            taps.append(unit.run(self.model, taps[-1]))
        return taps[1:]


def backbone_bytes(module: PixelsToTaps, backbone: Backbone, metadata: Mapping[str, str]) -> bytes:
    """Return a module as the bytes of a checked ONNX file; the backbone names its taps and the size of its images.

    Raises:
        ModelError: the module cannot be exported.
    """
    import onnx

    example = _random_pixels(backbone, 2)  # a batch of one would be taken for a fixed size
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=backbone.taps.names(),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelError(f"{backbone.architecture} cannot be exported as ONNX: {reason}") from error
    assert program is not None, "a file is only given where none was asked for"
    model = program.model_proto
    _remove_traces(model.graph)
    _add_zero_points(model.graph)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def compare_taps(backbone: Backbone, on_integers: Backbone, data: bytes) -> TapAgreement | None:
    """Run an exported file on random pixels beside the backbone; None where onnxruntime is not installed.

    The backbone is on the float kernel; `on_integers` is the same on another one, which shows what flipped codes do.

    Raises:
        ModelError: taps differ by more than codes that a rounding flips can do.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    onnxruntime = importlib.import_module("onnxruntime")  # no dependency, and without type information
    options = onnxruntime.SessionOptions()
    # Processors without VNNI would saturate products of uint8 and int8: a slower, right way is taken there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = backbone.taps.names()
    largest, allowed = dict.fromkeys(names, 0.0), MAX_DIFFERENCE
    for batch in (1, 3):
        pixels = _random_pixels(backbone, batch)
        found = [torch.from_numpy(tap) for tap in session.run(names, {INPUT: pixels.numpy()})]
        for name, tap, own, expected in zip(names, found, on_integers(pixels), backbone(pixels), strict=True):
            largest[name] = max(largest[name], _difference(tap, expected))
            allowed = max(allowed, min(MAX_OF_KERNELS * _difference(own, expected), 1.0))
    worst = max(names, key=largest.__getitem__)
    if largest[worst] > allowed:
        raise ModelError(
            f"the exported network is not the backbone: its tap {worst} differs by {largest[worst]:.3g} of its largest "
            f"value, where {allowed:.3g} is allowed; nothing was written"
        )
    return TapAgreement(tap=worst, largest_difference=largest[worst])


def _difference(tap: Tensor, expected: Tensor) -> float:
    """Share of the largest value; infinite where one of them is no number."""
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((tap - expected).abs().max() / scale).nan_to_num(nan=torch.inf))


def _random_pixels(backbone: Backbone, batch: int) -> Tensor:
    shape = (batch, N_CHANNELS, backbone.preprocess.height, backbone.preprocess.width)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _require_eight_bits(artefact: Artefact, path: Path) -> None:
    others = {name: said.scheme for name, said in artefact.layers.items() if said.scheme != SCHEME}
    if others:
        name, scheme = next(iter(others.items()))
        more = f", as have {len(others) - 1} other layers" if len(others) > 1 else ""
        raise ModelError(
            f"{path} cannot be exported: {name} has {scheme}{more}, and ONNX multiplies integers of 8 bits alone: "
            f"quantise with `scheme={SCHEME!r}`, and `overrides` with {SCHEME} or float alone"
        )


def _add_zero_points(graph: Any) -> None:
    """Give each weight a zero point, which is 0, of its own.

    Torch's exporter would let weights of a size share one, and onnxruntime's `session.x64quantprecision` then fails.
    """
    import onnx

    sizes = {part.name: part.dims for part in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2:
            zeros = np.zeros(sizes[node.input[1]], np.int8)
            node.input.append(f"{node.output[0]}_zero_point")
            graph.initializer.append(onnx.numpy_helper.from_array(zeros, node.input[2]))


def _remove_traces(graph: Any) -> None:
    """Remove what the exporter notes at every node: much of the file, and paths of this machine."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
