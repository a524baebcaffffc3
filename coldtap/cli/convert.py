"""`coldtap convert STORE NEW`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.job_texts import as_dict, sentence
from coldtap.cli.measured_errors import show_errors, show_share
from coldtap.cli.options import AsJson, CompleteStore, DryRun, Layout, MaxError, Tier
from coldtap.cli.output import say
from coldtap.stores.writing.stopping import sigterm_interrupts


def convert(
    store: CompleteStore,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new store: a new path, or one to go on with.")],
    tier: Tier,
    layout: Layout = None,
    snr: Annotated[
        float | None,
        typer.Option(help="Of int8: signal to noise in every channel, in dB. Default: the codes' own, or 30."),
    ] = None,
    max_error: MaxError = None,
    dry_run: DryRun = False,
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
        about = as_dict(
            report,
            converted_from=str(store),
            overflown=report.n_overflown,
            exact=report.exact,
            bound=report.bound,
            source_bound=report.source_bound,
            together=report.together,
            added_errors=report.added_errors,
        )
        print(json.dumps(about, indent=1))
        return
    say(sentence(report))
    for line in _error_lines(report, store):
        say(line)


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
        coded = {name for name in report.added_errors if report.bound is not None and not name.startswith("pooled/")}
        for name, taps in report.added_errors.items():
            yield f"  {name}{'' if taps else '  not measured: too few rows' if name in coded else '  none'}"
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
