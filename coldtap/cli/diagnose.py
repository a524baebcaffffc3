"""`diagnose MODEL`: what quantisation takes from a backbone, and what compensation gives back, site by site."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coldtap.cli import options as shared
from coldtap.cli.output import say
from coldtap.text import text_table

if TYPE_CHECKING:
    from coldtap.pipeline.quantisation.diagnosis.result import Diagnosis, Spread


def diagnose(
    model: shared.QuantisableModel,
    calibration: Annotated[
        Path,
        typer.Option(help="Images to calibrate on, and others to measure on: any source that cache-features takes."),
    ],
    out: Annotated[Path, typer.Option(help="The folder for sites.csv, diagnosis.png and diagnosis.json.")],
    scheme: shared.Scheme = "w8a8",
    seeds: Annotated[int, typer.Option(help="Calibrate so many times, with seeds from 0 on.")] = 3,
    images: Annotated[
        int | None,
        typer.Option(
            help="Calibration images; a quarter as many others are held out. Default: 512 in all, or all where there "
            "are fewer, a fifth of them held out."
        ),
    ] = None,
    checkpoint: shared.Checkpoint = None,
    random_weights: shared.RandomWeights = False,
    ranges: shared.Ranges = "least-squares",
    reparameterise: shared.Reparameterise = True,
    override: shared.Override = None,
    target: shared.Target = "local",
    input_size: shared.InputSize = None,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
) -> None:
    """Show what quantisation takes from MODEL and what CWAC and QwT give back, with several calibration seeds.

    Numbers are signal to noise in dB, on images held out of the fits. No quantised backbone is written.
    """
    from coldtap.cli.progress import UnitProgress
    from coldtap.pipeline.quantisation.diagnosis.diagnose import FILES
    from coldtap.pipeline.quantisation.diagnosis.diagnose import diagnose as run
    from coldtap.stores.writing.stopping import sigterm_interrupts

    with sigterm_interrupts(), UnitProgress() as progress:
        diagnosis = run(
            model,
            calibration,
            out,
            scheme=scheme,
            seeds=seeds,
            images=images,
            checkpoint=checkpoint,
            random_weights=random_weights,
            preprocess={} if input_size is None else {"input_size": input_size},
            device=device,
            ranges=ranges,  # type: ignore[arg-type] # checked inside, with a message
            reparameterise=reparameterise,
            overrides=override or (),
            target=target,  # type: ignore[arg-type]
            reporter=progress,
        )
    if as_json:
        print(json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False))
        return
    for table in _tables(diagnosis):
        say(*table.splitlines(), "")
    n_seeds = len(diagnosis.runs)
    say(
        f"{out}: {', '.join(FILES)}; {diagnosis.architecture} in {diagnosis.scheme}, {n_seeds} "
        f"{'seeds: mean (lowest … highest)' if n_seeds > 1 else 'seed'}; {diagnosis.n_calibration} images to calibrate "
        f"on, {diagnosis.n_held_out} others held out"
    )


def _tables(diagnosis: "Diagnosis") -> Sequence[str]:
    """Sites, blocks and taps."""
    sites = [
        (
            site.name,
            _db(site.uncompensated_db),
            _db(site.cwac_db),
            f"{site.kept.mean:.0%}",
            f"{site.off_diagonal_share.mean:.1%}",
            f"{site.off_diagonal_share_of_change.mean:.0%}",
            _db(site.full_gain_db),
        )
        for site in diagnosis.sites
    ]
    blocks = [(block.name, _db(block.uncompensated_db), _db(block.qwt_db)) for block in diagnosis.blocks]
    taps = [(tap.name, _db(tap.uncompensated_db), _db(tap.cwac_db), _db(tap.qwt_db)) for tap in diagnosis.taps]
    kept, off, change = "channels kept", "off-diagonal of M", "of M − 1"
    return [
        text_table(("site, dB", "before", "CWAC", kept, off, change, "full M over CWAC"), sites, numbers_right=True),
        text_table(("block, dB", "before", "QwT"), blocks, numbers_right=True),
        text_table(("tap, dB", "before", "CWAC", "QwT"), taps, numbers_right=True),
    ]


def _db(spread: "Spread") -> str:
    from coldtap.pipeline.quantisation.compensation.site_table import show_db

    mean = show_db(spread.mean)
    return mean if len(spread.values) == 1 else f"{mean} ({show_db(spread.lowest)} … {show_db(spread.highest)})"
