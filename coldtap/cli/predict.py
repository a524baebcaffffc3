"""`coldtap predict RUN SOURCE`: the one place where backbone and adaptor meet."""

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.options import Device, FinishedRun, RunAdaptor
from coldtap.cli.output import say
from coldtap.text import csv_cell


def predict(
    run: FinishedRun,
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Images, with labels or without; a flat folder will do.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The backbone's name: where the run recorded another, or its weights have to be fetched."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The backbone's local weights.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The store was made with random weights.")
    ] = False,
    quantized: Annotated[
        Path | None, typer.Option(help="The quantised backbone's file, where the store was made with one.")
    ] = None,
    adaptor: RunAdaptor = None,
    split: Annotated[str | None, typer.Option(help="train, val or test. Default: all images.")] = None,
    out: Annotated[Path | None, typer.Option(help="A CSV file. Default: standard output.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 32,
    device: Device = "auto",
) -> None:
    """Run backbone and adaptor on new images: one CSV line per image, and the accuracy where classes are known.

    Where images have several labels, those likelier than not are given, with | between them.

    A backbone whose extractor is not the one that the adaptor was trained on is refused.
    """
    from coldtap.errors import OptionError
    from coldtap.pipeline.images.sources import open_source
    from coldtap.workflows.predict import Predictor

    if batch_size < 1:
        raise OptionError(f"--batch-size {batch_size}: give at least 1 image")
    predictor = Predictor.load(
        run,
        adaptor=adaptor,
        model=model,
        checkpoint=checkpoint,
        random_weights=random_weights,
        quantised=quantized,
        device=device,
    )
    images = open_source(source, labels="optional")
    listing = images.listing
    wanted = [i for i, of in enumerate(listing.splits) if split in (None, of)]
    if not wanted:
        raise OptionError(f"--split {split}: {source} has no such images, only {sorted(set(listing.splits))}")
    results = predictor.predict(images, wanted, batch_size)
    right = total = bad = 0
    with _writer(out) as write:
        write(["id", "predicted", "name", "probability", "error"])
        for index, result in results:
            if isinstance(result, str):
                bad += 1
                write([listing.ids[index], "", "", "", result])
                continue
            names = (predictor.name_of(label) for label in result.labels)
            chances = (f"{probability:.4f}" for probability in result.probabilities)
            write([listing.ids[index], *("|".join(map(str, part)) for part in (result.labels, names, chances)), ""])
            if listing.targets is not None and predictor.knows_labels:
                total += 1
                right += predictor.is_right(result.labels[0], listing, index)
    if total:
        say(f"top-1 {right / total:.4f} on {total} labelled images", err=True)
    if bad:
        say(f"{bad} images could not be used; their lines say why", err=True)


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[list[Any]], Any]]:
    """Writes CSV lines to a file, or to standard output."""
    from coldtap.errors import MachineError

    try:
        place = nullcontext(sys.stdout) if out is None else out.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror}; give another --out") from error
    with place as file:
        writer = csv.writer(file, lineterminator="\n")
        yield lambda cells: writer.writerow([csv_cell(str(cell)) for cell in cells])
