"""`coldtap export RUN`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.options import AsJson, FinishedRun, Format, RunAdaptor
from coldtap.cli.output import say
from coldtap.errors import OptionError
from coldtap.text import show_bytes

FORMATS = ("onnx",)


def require_format(to: str) -> None:
    """Require a format that can be written.

    Raises:
        OptionError: it is none.
    """
    if to not in FORMATS:
        raise OptionError(f"--format {to}: choose one of {', '.join(FORMATS)}")


def export(
    run: FinishedRun,
    to: Format = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file. Default: adaptor.onnx in the run folder.")] = None,
    adaptor: RunAdaptor = None,
    as_json: AsJson = False,
) -> None:
    """Write the adaptor of RUN, without the backbone, as one file for an edge device.

    Its input `features` is float32: of `layers` (batch, tap, token, channel), of `sum` (batch, token, channel), of
    `pooled` (batch, tap, prefix + 1, channel), the last position the mean of the patch tokens. Feed restored values,
    never int8 codes or scaled float16, taps in the order that the file's metadata names. Its output `logits` is
    (batch, class), or (batch, patch, class) with pool=tokens.
    """
    from coldtap.adaptors.runs.onnx import export_onnx

    require_format(to)
    report = export_onnx(run, out, adaptor=adaptor)
    if as_json:
        print(json.dumps(_as_dict(report, run), indent=1))
        return
    for line in _lines(report):
        say(line)


def _as_dict(report: Any, run: Path) -> dict[str, Any]:
    from coldtap.adaptors.runs.onnx import OPSET

    agreement = report.agreement
    return {
        "run": str(run),
        "file": str(report.path),
        "bytes": report.n_bytes,
        "opset": OPSET,
        "features": report.info.features.to_dict(),
        "row_shape": list(report.info.features.row_shape),
        "largest_difference": agreement and agreement.largest_difference,
        "largest_logit": agreement and agreement.largest_logit,
        "was_there": report.was_there,
    }


def _lines(report: Any) -> list[str]:
    from coldtap.adaptors.runs.onnx import OPSET

    info, agreement = report.info, report.agreement
    there = "is there already; nothing to do" if report.was_there else "written"
    shape = ", ".join(map(str, info.features.row_shape))
    taps = ", ".join(map(str, info.features.taps))
    compared = (
        "not compared with torch: onnxruntime is not installed"
        if agreement is None
        else f"onnxruntime against torch on random features: logits differ by at most "
        f"{agreement.largest_difference:.2g}, the largest is {agreement.largest_logit:.3g}"
    )
    return [
        f"{report.path}: {info.settings.adaptor}, {info.parameters} parameters, {show_bytes(report.n_bytes)}, "
        f"opset {OPSET}; {there}",
        f"features: float32 (batch, {shape}), {info.features.gather} of tap {taps}",
        compared,
    ]
