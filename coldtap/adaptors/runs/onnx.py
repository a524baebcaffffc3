"""A trained adaptor as one ONNX file, for devices that have neither torch nor coldtap.

The file has one input, `features`, and one output, `logits`, both float32 and with a free batch axis. Its metadata
says what to feed: which taps of which extractor, gathered how, in which order and shape; what the logits mean; and the
names of the classes.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.runs.load import load_adaptor
from coldtap.adaptors.runs.record import RunInfo
from coldtap.errors import OptionError, RunError
from coldtap.extras import require_extra
from coldtap.stores.format.canonical import canonical_json
from coldtap.stores.storage.atomic import write_file
from coldtap.version import __version__

OPSET = 18  # what torch's exporter writes of itself, without converting
INPUT, OUTPUT = "features", "logits"
FILE_NAME = "adaptor.onnx"
MAX_DIFFERENCE = 1e-3  # share of the largest logit; sums in another order differ by some 1e-6 of it
AXES = {
    "layers": "(batch, tap, token, channel)",
    "sum": "(batch, token, channel)",
    "pooled": "(batch, tap, prefix + 1, channel), the last position the mean of the patch tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """onnxruntime's logits beside torch's, on random features: the largest difference, and the largest logit."""

    largest_difference: float
    largest_logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """A written ONNX file: where it is, its size, and what the run says of it.

    `agreement` is None where onnxruntime is not installed; `was_there` says that the file was there already, the same.
    """

    path: Path
    n_bytes: int
    info: RunInfo
    agreement: Agreement | None
    was_there: bool


def export_onnx(run: str | Path, out: str | Path | None = None, *, adaptor: str | None = None) -> OnnxExport:
    """Write the adaptor of a finished run, without the backbone, as one ONNX file: whole or not at all.

    Args:
        run: The run folder.
        out: The file; without it `adaptor.onnx` in the run folder. A file with the same bytes is left as it is.
        adaptor: The run's adaptor where it is none of coldtap's own, as `module:NAME`.

    Raises:
        RunError: The run cannot be read, its network cannot be exported, or `out` holds something else.
        OptionError: `out` is a folder.
        MissingExtraError: A package of `coldtap[onnx]` is not installed.
        MachineError: The disk is full, read-only or refuses.
    """
    path = Path(run) / FILE_NAME if out is None else Path(out)
    if path.is_dir():
        raise OptionError(f"`out={str(path)!r}` is a folder: give a file, such as {path / FILE_NAME}")
    require_extra("onnx", for_="export")
    module, info = load_adaptor(run, adaptor=adaptor)
    data = onnx_bytes(module, info.features, metadata_of(info))
    agreement = compare_logits(module, data, info.features)
    was_there = path.exists()
    if not was_there:
        write_file(path, [data])
    elif path.read_bytes() != data:
        raise RunError(f"{path} is there already and holds something else: choose another `out`, or delete it")
    return OnnxExport(path=path, n_bytes=len(data), info=info, agreement=agreement, was_there=was_there)


def metadata_of(info: RunInfo) -> dict[str, str]:
    """Return what an exported file says of itself: text by name, JSON where a value has parts."""
    parts: dict[str, Any] = {
        "options": dict(info.settings.options),
        "features": {**info.features.to_dict(), "axes": AXES[info.features.gather]},
        "extractor": dict(info.extractor),
        "class_names": None if info.class_names is None else list(info.class_names),
    }
    return {
        "coldtap_version": __version__,
        "adaptor": info.settings.adaptor,
        "model": info.model,
        "target": info.settings.target,
        "target_kind": info.target_kind,
        "extractor_digest": info.extractor_digest,
        **{name: canonical_json(value).decode() for name, value in parts.items()},
    }


def onnx_bytes(module: nn.Module, features: FeatureSpec, metadata: Mapping[str, str]) -> bytes:
    """Return a module as the bytes of a checked ONNX file.

    Args:
        module: Maps features (batch, *row_shape) to logits; in eval mode, float32, on the CPU.
        features: The features that it reads.
        metadata: Names and texts that the file carries.

    Raises:
        RunError: The module cannot be exported.
    """
    import onnx

    example = torch.zeros(2, *features.row_shape)  # a batch of one would be taken for a fixed size
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RunError(f"{type(module).__name__} cannot be exported as ONNX: {reason}") from error
    assert program is not None, "a file is only given where none was asked for"
    model = program.model_proto
    _remove_traces(model.graph)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def compare_logits(module: nn.Module, data: bytes, features: FeatureSpec) -> Agreement | None:
    """Run an exported file on random features beside the module; None where onnxruntime is not installed.

    Raises:
        RunError: The logits differ by more than the order of a sum can do.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    onnxruntime = importlib.import_module("onnxruntime")  # no dependency, and without type information
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    noise = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for batch in (1, 5):
        values = torch.randn(batch, *features.row_shape, generator=noise)
        with torch.inference_mode():
            expected = module(values)
        (found,) = session.run([OUTPUT], {INPUT: values.numpy()})
        difference = max(difference, float((torch.from_numpy(found) - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if not difference <= MAX_DIFFERENCE * largest:
        raise RunError(
            f"the exported network is not the adaptor: its logits differ by {difference:.3g} where the largest is "
            f"{largest:.3g}; nothing was written"
        )
    return Agreement(largest_difference=difference, largest_logit=largest)


def _remove_traces(graph: Any) -> None:
    """Remove what the exporter notes at every node: six times the file's size, and paths of this machine."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
