"""`coldtap export-backbone FILE`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.export import require_format
from coldtap.cli.options import AsJson, Format
from coldtap.cli.output import say
from coldtap.text import show_bytes


def export_backbone(
    artefact: Annotated[
        Path, typer.Argument(metavar="FILE", help="A backbone that `coldtap quantize` wrote, of w8a8.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, such as backbone.onnx.")],
    to: Format = "onnx",
    as_json: AsJson = False,
) -> None:
    """Write the quantised backbone of FILE as one file for an edge device.

    Its input `pixels` is uint8 (batch, channel, height, width), RGB, resized and cropped; it is normalised inside. Its
    outputs are the taps by name (z0 … zN, or stage0 …), float32 (batch, token, channel). Quantised layers are
    QuantizeLinear and DequantizeLinear around a MatMul or a Conv, with compensation folded in.
    """
    from coldtap.pipeline.quantisation.onnx.export import export_backbone as run

    require_format(to)
    report = run(artefact, out)
    if as_json:
        print(json.dumps(_as_dict(report, artefact), indent=1))
        return
    for line in _lines(report):
        say(line)


def _as_dict(report: Any, artefact: Path) -> dict[str, Any]:
    from coldtap.pipeline.quantisation.onnx.export import OPSET

    agreement = report.agreement
    return {
        "artefact": str(artefact),
        "file": str(report.path),
        "bytes": report.n_bytes,
        "opset": OPSET,
        "architecture": report.about.architecture,
        "compensation": report.about.compensation,
        "quantised_layers": report.n_layers,
        "input_shape": list(report.input_shape),
        "taps": list(report.taps),
        "largest_difference": agreement and agreement.largest_difference,
        "tap_of_largest_difference": agreement and agreement.tap,
        "was_there": report.was_there,
    }


def _lines(report: Any) -> list[str]:
    from coldtap.pipeline.quantisation.onnx.export import OPSET

    about, agreement = report.about, report.agreement
    there = "is there already; nothing to do" if report.was_there else "written"
    shape = ", ".join(map(str, report.input_shape))
    compared = (
        "not compared with coldtap's: onnxruntime is not installed"
        if agreement is None
        else "onnxruntime against coldtap on random pixels: taps differ by at most "
        f"{agreement.largest_difference:.2g} of their largest value ({agreement.tap})"
    )
    return [
        f"{report.path}: {about.architecture}, {report.n_layers} layers in {about.scheme}, compensation "
        f"{about.compensation}, {show_bytes(report.n_bytes)}, opset {OPSET}; {there}",
        f"pixels: uint8 (batch, {shape}); taps {report.taps[0]} … {report.taps[-1]}: float32 (batch, token, channel)",
        compared,
    ]
