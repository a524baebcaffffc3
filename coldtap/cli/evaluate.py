"""`coldtap evaluate RUN STORE`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from coldtap.cli.errors import in_flags
from coldtap.cli.options import AsJson, Device, FinishedRun, RunAdaptor
from coldtap.cli.output import say


def evaluate(
    run: FinishedRun,
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A complete store of the same backbone.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    compensation: Annotated[
        str | None,
        typer.Option(help="Name of a compensation of STORE. Default: the run's own, on features of its extractor."),
    ] = None,
    across_quantisation: Annotated[
        bool,
        typer.Option("--across-quantisation", help="STORE may differ from the run in quantisation and precision."),
    ] = False,
    adaptor: RunAdaptor = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained adaptor on a split of STORE; nothing is written."""
    from coldtap.adaptors import evaluate_adaptor

    found = evaluate_adaptor(
        run,
        store,
        split=split,
        compensation=compensation,
        across_quantisation=across_quantisation,
        adaptor=adaptor,
        device=device,
        note=lambda sentence: say(in_flags(sentence), err=True),
    )
    if as_json:
        print(json.dumps({**asdict(found), "run": str(run), "store": str(store)}, indent=1))
        return
    scores = ", ".join(f"{name} {score:.4f}" for name, score in found.metrics.scores.items())
    through = f", compensation {found.compensation}" if found.compensation else ""
    say(f"{run} on {store}, {split} ({found.metrics.n_samples} samples){through}: {scores}")
