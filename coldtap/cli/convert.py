"""`coldtap convert STORE NEW`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.measured_errors import show_errors, show_share
from coldtap.cli.options import AsJson
from coldtap.stores.writing.stopping import sigterm_interrupts
from coldtap.text import show_bytes, show_seconds


def convert(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A complete store.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new store: a new path, or one to go on with.")],
    tier: Annotated[str, typer.Option(help="float32, float16, bfloat16, or int8: codes with a bounded error.")],
    layout: Annotated[
        str | None, typer.Option(help="Of int8: compact (zstd; the default) or fast (twice the speed, a third larger).")
    ] = None,
    snr: Annotated[
        float | None,
        typer.Option(help="Of int8: signal to noise in every channel, in dB. Default: the codes' own, or 30."),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Of int8, instead: largest error of a value, in deviations of its channel.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the forecast of bytes and time, write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the features of STORE into NEW in another tier or layout, without the backbone.

    It states the error that this adds. The same command goes on after any interruption.
    """
    from coldtap.cli.progress import JobProgress
    from coldtap.stores.convert.convert import convert_store

    with sigterm_interrupts(), JobProgress("rows") as progress:
        report = convert_store(
            store,
            new,
            tier=tier,  # type: ignore[arg-type] # checked inside, with a message
            layout=layout,  # type: ignore[arg-type]
            snr=snr,
            max_error=max_error,
            dry_run=dry_run,
            reporter=progress,
        )
    if as_json:
        print(json.dumps(_as_dict(report, store), indent=1))
        return
    print(_sentence(report))
    for line in _error_lines(report, store):
        print(line)


def _as_dict(report: Any, store: Path) -> dict[str, Any]:
    ahead = report.forecast
    return {
        "store": str(report.store),
        "converted_from": str(store),
        "status": report.status,
        "digest": report.digest,
        "rows": report.n_rows,
        "rejected": report.n_rejected,
        "overflown": report.n_overflown,
        "exact": report.exact,
        "bound": report.bound,
        "source_bound": report.source_bound,
        "together": report.together,
        "added_errors": report.added_errors,
        "forecast": ahead
        and {"rows": ahead.n_rows, "bytes": ahead.n_bytes, "seconds": ahead.seconds, "free_bytes": ahead.free_bytes},
    }


def _sentence(report: Any) -> str:
    rejected = f", {report.n_rejected} rejected (see rejected.parquet)" if report.n_rejected else ""
    match report.status:
        case "forecast":
            ahead = report.forecast
            size, time = show_bytes(ahead.n_bytes), show_seconds(ahead.seconds)
            return f"would write {ahead.n_rows} rows, {size}, in about {time} to {report.store}; nothing was written"
        case "unchanged":
            return f"{report.store} is complete: {report.n_rows} rows{rejected}; nothing to do"
        case _:
            return f"{report.store}: {report.n_rows} rows{rejected}; digest {report.digest}"


def _error_lines(report: Any, store: Path) -> Iterator[str]:
    """What the conversion adds to the errors that are there already."""
    if report.n_overflown:
        yield (
            f"{report.n_overflown} rows of {store} overflow float16 at its scale and are not there: "
            "--tier bfloat16 or float32 keeps values of any size"
        )
    lossy = {name: taps for name, taps in report.added_errors.items() if taps}
    if report.exact:
        yield "no error added: codes, scales and escapes are those of the old store"
    elif not lossy and report.bound is None:
        yield "no error added: every value is that of the old store"
    else:
        stated = f" (asked: {report.bound})" if report.bound else ""
        yield f"added error, worst channel against the values of {store}{stated}:"
        for name, taps in report.added_errors.items():
            yield f"  {name}{'' if taps else '  not measured: too few rows' if _is_coded(report, name) else '  none'}"
            yield from (f"    {_tap(about)}" for about in taps)
    if report.source_bound:
        together = f", {report.together} together" if report.together else ""
        yield (
            f"errors add up: those of {store}'s own codes ({report.source_bound}) stay{together}"
            if report.bound and not report.exact
            else f"the errors of {store}'s own codes ({report.source_bound}) stay"
        )


def _tap(about: Mapping[str, Any]) -> str:
    escaped = f"; {show_share(about['escaped'])} escaped" if about.get("escaped") else ""
    return f"tap {about['tap']:>3}  {show_errors(about)}{escaped}"


def _is_coded(report: Any, name: str) -> bool:
    return report.bound is not None and not name.startswith("pooled/")
