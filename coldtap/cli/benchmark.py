"""`coldtap benchmark FOLDER --adaptors … --out OUT`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coldtap.cli import options as shared
from coldtap.cli.errors import in_flags
from coldtap.cli.output import say
from coldtap.cli.train import parse_grid, parse_pairs
from coldtap.errors import ColdtapError, InterruptedRunError, ModelError, OptionError
from coldtap.stores.writing.stopping import sigterm_interrupts
from coldtap.text import show_bytes

if TYPE_CHECKING:
    from coldtap.workflows.benchmark.run import Benchmark


def benchmark(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Datasets: a .parquet file each, or a folder each, in the VTAB-1K layout or with class folders.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for stores, runs and tables: new, or one to go on with.")],
    adaptors: Annotated[
        str, typer.Option(help="With commas: linear, attentive, head2toe, mist, ladder, combo, last, or module:NAME.")
    ] = "linear,mist,last",
    sets: Annotated[str, typer.Option(help="Datasets to take, with commas. Default: all.")] = "",
    protocol: Annotated[
        str,
        typer.Option(
            help="vtab: fit on train, choose on val, fit the choice anew on both with every seed, test once. val: fit "
            "with every seed, choose on val, test."
        ),
    ] = "vtab",
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            help="Values to try: of the training of all adaptors, such as lr=1e-3,4e-3, or of one, such as "
            "last.rank=4,8; repeat it. Where it names no lr: a quarter of the adaptor's own, its own, 4 times its own.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An option of one adaptor, such as last.rank=8; repeat it.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds of each result.")] = 3,
    epochs: shared.Epochs = 100,
    batch_size: shared.BatchSize = 32,
    weight_decay: shared.WeightDecay = 0.05,
    model: Annotated[str, typer.Option(help="A timm model name, or coldtap/vit-reference.")] = "coldtap/vit-reference",
    checkpoint: shared.Checkpoint = None,
    random_weights: shared.RandomWeights = False,
    tier: Annotated[str, typer.Option(help="Of the stores: float32, float16, bfloat16 or int8.")] = "float16",
    device: shared.Device = "auto",
    jobs: Annotated[int, typer.Option(help="Cells trained at a time, each in a process of its own.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be cached and trained, write nothing.")
    ] = False,
) -> None:
    """Train adaptors on a folder of datasets by one protocol, and print the table that a paper prints.

    Each dataset is cached once, with what the adaptors read. The table is OUT/table.txt, table.csv and table.html too.
    The same command goes on after any interruption; OUT keeps its rules, and one that asks for more datasets, adaptors,
    values or seeds adds to it. A cell that fails says why in the table; the exit code is then that of the first error.
    """
    from coldtap.adaptors.results import table_text
    from coldtap.adaptors.training.options import TrainingOptions
    from coldtap.cli.progress import BenchmarkDisplay
    from coldtap.pipeline.images.sources.collection import find_datasets
    from coldtap.workflows.benchmark.cell import Rules
    from coldtap.workflows.benchmark.contenders import make_contenders
    from coldtap.workflows.benchmark.run import Benchmark, run_benchmark

    training = TrainingOptions(epochs=epochs, batch_size=batch_size, weight_decay=weight_decay)
    asked = Benchmark(
        datasets=find_datasets(folder, _names(sets)),
        contenders=make_contenders(
            _names(adaptors),
            parse_pairs(settings or [], flag="--set", example="last.rank=8"),
            parse_grid(grid or []),
            training,
        ),
        rules=Rules(protocol=protocol, seeds=seeds, training=training, device=device),
        caching={
            "model": model,
            "checkpoint": checkpoint,
            "random_weights": random_weights,
            "tier": tier,
            "device": device,
        },
        out=out,
    )
    _require_room(folder, out, jobs)
    say(*asked.budget())
    with sigterm_interrupts():
        if dry_run:
            _forecast(asked)
            return
        table, exit_code = run_benchmark(asked, jobs=jobs, tell=_tell, display=BenchmarkDisplay())
    say("", *in_flags(table_text(table)).splitlines(), f"{out}: table.txt, table.csv and table.html hold it too")
    if exit_code:
        raise typer.Exit(exit_code)


def _tell(line: str) -> None:
    say(in_flags(line), err=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _require_room(folder: Path, out: Path, jobs: int) -> None:
    if out.resolve().is_relative_to(folder.resolve()):
        raise OptionError(f"--out {out} lies in {folder}, where it would be taken for a dataset: choose another folder")
    if jobs < 1:
        raise OptionError(f"--jobs {jobs}: give at least 1 process")


def _forecast(asked: "Benchmark") -> None:
    """Print what each store would take."""
    from coldtap.cli.progress import BenchmarkDisplay
    from coldtap.workflows.benchmark.rules import settled_rules
    from coldtap.workflows.benchmark.run import cache_dataset

    settled_rules(asked)
    for dataset in asked.datasets:
        try:
            report = cache_dataset(asked, dataset, dry_run=True, display=BenchmarkDisplay())
        except (InterruptedRunError, OptionError, ModelError):
            raise
        except ColdtapError as error:
            say(f"{dataset}: cannot be cached: {in_flags(str(error))}")
            continue
        ahead = report.forecast
        say(
            f"{dataset}: {asked.store(dataset)} is complete, {report.n_rows} rows"
            if ahead is None
            else f"{dataset}: {ahead.n_rows} rows, {show_bytes(ahead.n_bytes)} to {asked.store(dataset)}"
        )
    say("nothing was written")
