"""`coldtap verify STORE`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coldtap.cli.options import AsJson, CompleteStore
from coldtap.cli.output import say
from coldtap.text import show_bytes


def verify(
    store: CompleteStore,
    source: Annotated[
        Path | None, typer.Option(help="Also compare the images with what was read when the store was made.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every digest, checksum and shape of a store; exit code 1 if anything is wrong."""
    from coldtap.cli.progress import WorkProgress
    from coldtap.extras import require_extra
    from coldtap.stores.verify.verify import verify_store

    if source is not None:
        require_extra("extract", for_="verify --source")
    with WorkProgress() as progress:

        def begin(n_bytes: int) -> None:
            total = show_bytes(n_bytes)
            progress.start(
                n_bytes, lambda done, rate: f"{show_bytes(done)} of {total}  {show_bytes(rate)}/s", last_line=False
            )

        result = verify_store(store, begin=begin, advance=progress.advance)
    problems = list(result.problems)
    if source is not None and not problems:
        from coldtap.workflows.check_source import check_source

        problems += check_source(source, store)
    if as_json:
        found = [{"where": problem.where, "what": problem.what} for problem in problems]
        about = {"store": str(store), "digest": result.digest, "files": result.n_files, "bytes": result.n_bytes}
        print(json.dumps({**about, "rows": result.n_rows, "problems": found}, indent=1))
    else:
        for problem in problems:
            say(f"{problem.where}: {problem.what}")
        checked = f"{result.n_files} files, {show_bytes(result.n_bytes)}, {result.n_rows} rows"
        verdict = f"{len(problems)} problems" if problems else "nothing wrong"
        say(f"{store}: {checked} checked{' against its source too' if source else ''}: {verdict}")
    if problems:
        raise typer.Exit(1)
