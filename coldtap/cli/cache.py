"""`cache-features SOURCE STORE`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coldtap.cli import options as shared
from coldtap.cli.job_texts import as_dict, sentence
from coldtap.cli.output import say
from coldtap.stores.writing.stopping import sigterm_interrupts

TRIPLE = "three numbers with commas, one per channel"


def cache_features(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Images: a folder of class folders (with or without train/ val/ test/), a VTAB-1K folder, a .parquet "
            "file or a folder of them, or a .csv or .parquet list of paths.",
        ),
    ],
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store: a new path, or one to go on with.")],
    model: Annotated[
        str | None,
        typer.Option(help="A timm model name. Default: coldtap/vit-reference, or what --quantized was made of."),
    ] = None,
    checkpoint: shared.Checkpoint = None,
    random_weights: shared.RandomWeights = False,
    quantized: Annotated[
        Path | None,
        typer.Option(help="A quantised backbone of `coldtap quantize`: it brings its weights and its preprocessing."),
    ] = None,
    kernel: Annotated[
        str, typer.Option(help="Of a quantised backbone: auto (the fastest that is exact), int or float.")
    ] = "auto",
    taps: Annotated[str, typer.Option(help="For layers and pooled: all, last:K, or indices such as 0,3,6.")] = "all",
    gather: Annotated[
        list[str] | None,
        typer.Option(help="layers, sum or pooled; repeat it for several. Default: all that the backbone allows."),
    ] = None,
    sum_at: Annotated[
        str | None, typer.Option(help="Keep z0 + … + zk at these k, such as 6,12. Default: the last tap.")
    ] = None,
    tier: shared.Tier = "float16",
    layout: shared.Layout = None,
    snr: Annotated[
        float | None, typer.Option(help="Of int8: signal to noise in every channel, in dB. Default: 30.")
    ] = None,
    max_error: shared.MaxError = None,
    precision: Annotated[str, typer.Option(help="Of the backbone: float32, bfloat16 or float16.")] = "float32",
    split: Annotated[
        list[str] | None, typer.Option(help="train, val or test; repeat it for several. Default: all.")
    ] = None,
    views: Annotated[int, typer.Option(help="Augmented views of each training image, beside the plain one.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass. Default: chosen by size.")] = None,
    device: shared.Device = "auto",
    decode_threads: Annotated[int | None, typer.Option(help="Of all workers together. Default: one per core.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that extract; the store's bytes do not depend on it.")] = 1,
    on_bad_image: Annotated[str, typer.Option(help="reject (the row is left out and listed) or fail.")] = "reject",
    max_rejected: Annotated[float, typer.Option(help="Share of samples beyond which the run fails.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the row order, of a val split cut from train, and of views.")] = 0,
    input_size: shared.InputSize = None,
    crop_pct: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    crop_mode: Annotated[str | None, typer.Option(help="center, squash or border. Default: the model's own.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="Such as bicubic. Default: the model's own.")] = None,
    mean: Annotated[str | None, typer.Option(help=f"{TRIPLE}. Default: the model's own.")] = None,
    std: Annotated[str | None, typer.Option(help=f"{TRIPLE}. Default: the model's own.")] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Go on although device, torch, timm or batch size are others now.")
    ] = False,
    dry_run: shared.DryRun = False,
    as_json: shared.AsJson = False,
) -> None:
    """Run a frozen backbone over SOURCE once and keep its features in STORE.

    The same command goes on after any interruption, and has nothing to do when the store is complete.
    """
    from coldtap.cli.progress import JobProgress
    from coldtap.pipeline.job import cache_features as cache

    overrides = {
        "input_size": input_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
    }
    with sigterm_interrupts(), JobProgress() as progress:
        report = cache(
            source,
            store,
            model=model,
            checkpoint=checkpoint,
            random_weights=random_weights,
            quantized=quantized,
            kernel=kernel,
            preprocess={name: value for name, value in overrides.items() if value is not None},
            precision=precision,  # type: ignore[arg-type] # checked inside, with a message
            device=device,
            taps=taps,
            gather=gather or None,
            sum_at=sum_at,
            tier=tier,  # type: ignore[arg-type]
            layout=layout,  # type: ignore[arg-type]
            snr=snr,
            max_error=max_error,
            split=split or None,
            views=views,
            seed=seed,
            batch_size=batch_size,
            decode_threads=decode_threads,
            workers=workers,
            on_bad_image=on_bad_image,  # type: ignore[arg-type]
            max_rejected=max_rejected,
            allow_mixed=allow_mixed,
            dry_run=dry_run,
            reporter=progress,
        )
    if as_json:
        print(json.dumps(as_dict(report), indent=1))
    else:
        say(sentence(report))


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    from coldtap.errors import OptionError

    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{option} {text}: expected {TRIPLE}, such as 0.5,0.5,0.5") from None
