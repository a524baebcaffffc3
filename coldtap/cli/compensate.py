"""`coldtap compensate STORE FLOAT_STORE`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.options import AsJson
from coldtap.cli.output import say
from coldtap.stores.writing.stopping import sigterm_interrupts

DONE = {
    "written": "written",
    "replaced": "written, in place of another of that name",
    "unchanged": "is there already; nothing to do",
}


def compensate(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Features of a quantised backbone.")],
    float_store: Annotated[
        Path, typer.Argument(metavar="FLOAT_STORE", help="Features of the float backbone, of some of the same images.")
    ],
    name: Annotated[str, typer.Option(help="Of the compensation.")] = "cwac",
    split: Annotated[str, typer.Option(help="Whose rows are used; others stay unseen.")] = "train",
    max_rows: Annotated[int | None, typer.Option(help="Use so many rows that both have. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit two numbers per channel that bring the features of STORE near to float ones, and record them in STORE.

    No feature is touched. `train-adaptor --compensation` and `coldtap evaluate --compensation` apply them.
    """
    from coldtap.stores.compensation.fit import fit_compensation

    with sigterm_interrupts():
        report = fit_compensation(store, float_store, name=name, split=split, max_rows=max_rows)
    gains = {array: [asdict(gain) for gain in of] for array, of in report.arrays.items()}
    if as_json:
        fields = {field: getattr(report, field) for field in report.__slots__}
        print(json.dumps({**fields, "store": str(report.store), "arrays": gains}, indent=1))
        return
    done = DONE[report.status]
    say(f"{store}: compensation {name} from {report.n_rows} {split} rows ({report.n_samples} samples) {done}")
    for array, of_taps in gains.items():
        for line in gain_lines(array, of_taps):
            say(line)


def gain_lines(array: str, gains: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the SNR of each tap of an array before and after, on samples that were held out."""
    return [
        f"    {array}  tap {gain['tap']:>3}  {_db(gain['before_db'])} → {_db(gain['after_db'])} dB, "
        f"{gain['mapped']} channels mapped"
        for gain in gains
    ]


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
