"""`train-adaptor STORE --adaptor NAME --out DIR`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.signals import sigterm_interrupts


def train_adaptor(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A complete store.")],
    adaptor: Annotated[str, typer.Option(help="linear, mist or last.")],
    out: Annotated[Path, typer.Option(help="The run folder: new, or one to go on with.")],
    epochs: Annotated[int, typer.Option(help="Passes over the train split.")] = 100,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the adaptor's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 32,
    weight_decay: Annotated[float, typer.Option(help="Of matrices; biases and norms have none.")] = 0.05,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the adaptor, such as rank=4; repeat it. `--set help` lists them."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the start, the order of samples, views and dropout.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shuffle: Annotated[
        str, typer.Option(help="uniform, or block: near reads, for a store far larger than memory.")
    ] = "uniform",
    resident: Annotated[
        bool | None,
        typer.Option("--resident/--stream", help="Keep features in memory, or read each batch. Default: by size."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a small network from STORE alone: no backbone, no images.

    The best epoch is chosen on val; test is read once, at the end. The same command goes on after any interruption.
    """
    from coldtap.adaptors import train_adaptor as train

    if settings == ["help"]:
        print(_options_of(adaptor))
        return
    with sigterm_interrupts(), _EpochLines() as lines:
        result = train(
            store,
            adaptor,
            out=out,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            weight_decay=weight_decay,
            warmup=warmup,
            settings=_parse(settings or []),
            seed=seed,
            device=device,
            resident=resident,
            shuffle=shuffle,
            progress=lines,
            note=lines.note,
        )
    info = result.info
    if as_json:
        print(json.dumps({"run": str(result.path), "finished_before": result.was_finished, **info.to_dict()}, indent=1))
        return
    if result.was_finished:
        print(f"{result.path} is finished already; nothing to do")
    scores = ", ".join(f"{split} {metrics.top1:.4f}" for split, metrics in info.metrics.items())
    print(
        f"{result.path}: {adaptor}, {info.parameters} parameters, epoch {info.best_epoch} of {epochs}: top-1 {scores}"
    )


def _parse(settings: list[str]) -> dict[str, str]:
    from coldtap.stores.errors import OptionError

    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise OptionError(f"--set {setting}: expected NAME=VALUE, such as rank=4")
        parsed[key] = value
    return parsed


def _options_of(adaptor: str) -> str:
    from coldtap.adaptors import option_defaults
    from coldtap.adaptors.networks.kinds import adaptor_kind

    return "\n".join(f"{name}={value}" for name, value in option_defaults(adaptor_kind(adaptor).options).items())


class _EpochLines:
    """A bar on a terminal, a line every tenth of the epochs elsewhere; on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True)) if sys.stderr.isatty() else None
        self._task: Any = None

    def __enter__(self) -> "_EpochLines":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def __call__(self, record: Any, *, epochs: int, best_epoch: int) -> None:
        text = f"epoch {record.epoch}/{epochs}  val {record.val_top1:.4f}  best at {best_epoch}"
        if self._bar is None:
            if record.epoch % max(epochs // 10, 1) == 0 or record.epoch == epochs:
                print(f"{text}  {record.seconds:.2f} s", file=sys.stderr, flush=True)
            return
        if self._task is None:
            self._task = self._bar.add_task(text, total=epochs)
        self._bar.update(self._task, description=text, completed=record.epoch)
