"""`quantize MODEL`: a quantised and compensated backbone as one file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from coldtap.cli import options as shared
from coldtap.cli.output import say
from coldtap.text import show_bytes


def quantize(
    model: shared.QuantisableModel,
    calibration: Annotated[
        Path,
        typer.Option(help="Images to calibrate on: any source that cache-features takes; of one with splits, train."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors); an older one is replaced.")],
    scheme: shared.Scheme = "w8a8",
    compensate: Annotated[
        str,
        typer.Option(
            help="cwac (two numbers per channel, folded away), qwt (a matrix per block, run beside it) or none."
        ),
    ] = "cwac",
    checkpoint: shared.Checkpoint = None,
    random_weights: shared.RandomWeights = False,
    images: Annotated[
        int | None, typer.Option(help="Calibration images. Default: 512, or all where there are fewer.")
    ] = None,
    ranges: shared.Ranges = "least-squares",
    reparameterise: shared.Reparameterise = True,
    override: shared.Override = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers that CWAC goes after; repeat it. Default: attn.proj and mlp.fc2, or every convolution. "
            "'*' is all.",
        ),
    ] = None,
    target: shared.Target = "local",
    ridge: Annotated[
        float | None,
        typer.Option(help="Of the compensation. Default: CWAC's own, and the best on held-out images for QwT."),
    ] = None,
    input_size: shared.InputSize = None,
    device: shared.Device = "auto",
    seed: Annotated[int, typer.Option(help="Chooses the calibration images.")] = 0,
    as_json: shared.AsJson = False,
) -> None:
    """Quantise a backbone, compensate it, and write it as one file for `cache-features --quantized`."""
    from coldtap.cli.progress import UnitProgress
    from coldtap.pipeline.quantisation.compensation.site_table import site_table
    from coldtap.pipeline.quantisation.quantize import quantize as run
    from coldtap.stores.writing.stopping import sigterm_interrupts

    with sigterm_interrupts(), UnitProgress() as progress:
        report = run(
            model,
            calibration,
            out,
            scheme=scheme,
            compensate=compensate,  # type: ignore[arg-type] # checked inside, with a message
            checkpoint=checkpoint,
            random_weights=random_weights,
            preprocess={} if input_size is None else {"input_size": input_size},
            device=device,
            images=images,
            ranges=ranges,  # type: ignore[arg-type]
            reparameterise=reparameterise,
            overrides=override or (),
            sites=site or None,
            target=target,  # type: ignore[arg-type]
            ridge=ridge,
            seed=seed,
            reporter=progress,
        )
    if as_json:
        print(json.dumps({**asdict(report), "path": str(report.path)}, indent=1))
        return
    if report.fits:
        say(*site_table(report.fits).splitlines())
    say(
        f"{report.path}: {report.n_layers} layers in {scheme}, {show_bytes(report.n_bytes)} (float32: "
        f"{show_bytes(report.float_bytes)}); digest {report.digest}"
    )
