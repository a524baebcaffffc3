"""`train-adaptor STORE --adaptor NAME --out DIR`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldtap.cli import options as shared
from coldtap.cli.epoch_lines import EpochLines
from coldtap.cli.output import say
from coldtap.stores.writing.stopping import sigterm_interrupts

if TYPE_CHECKING:
    from coldtap.adaptors import ProtocolResult, RunResult, Trials


def train_adaptor(
    store: shared.CompleteStore,
    adaptor: Annotated[
        str,
        typer.Option(help="linear, attentive, head2toe, mist, ladder, combo or last; or module:NAME of your own."),
    ],
    out: Annotated[Path, typer.Option(help="The run folder: new, or one to go on with; of trials, their folder.")],
    epochs: shared.Epochs = 100,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the adaptor's own.")] = None,
    batch_size: shared.BatchSize = 32,
    weight_decay: shared.WeightDecay = 0.05,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1,
    label_smoothing: Annotated[float, typer.Option(help="Share of a target spread over all classes.")] = 0.0,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better val score. Default: never.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the adaptor, such as rank=4; repeat it. `--set help` lists them."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            help="Values to try, such as lr=1e-3,3e-3 or rank=4,8; repeat it for every combination. All trials share "
            "each batch; the best setting on val is tested.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train with so many seeds, from --seed on; they share each batch.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the start and dropout; of the order too, unless --order-seed.")] = 0,
    order_seed: Annotated[int | None, typer.Option(help="Of the order of samples and views. Default: --seed.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="val: fit on train, choose on val, test. vtab: then fit the chosen setting anew on train and val with "
            "every seed, and test once."
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="Name of the targets.")] = "label",
    compensation: Annotated[
        str | None, typer.Option(help="Name of a compensation of STORE that features go through.")
    ] = None,
    device: shared.Device = "auto",
    shuffle: Annotated[
        str, typer.Option(help="uniform, or block: near reads, for a store far larger than memory.")
    ] = "uniform",
    resident: Annotated[
        bool | None,
        typer.Option("--resident/--stream", help="Keep features in memory, or read each batch. Default: by size."),
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Train a small network from STORE alone: no backbone, no images.

    The best epoch is chosen on val; test is read once, at the end. The same command goes on after any interruption.
    """
    from coldtap.adaptors import TrainingOptions, option_defaults
    from coldtap.adaptors import train_adaptor as train
    from coldtap.adaptors.networks.kinds import adaptor_kind

    if settings == ["help"]:
        defaults = option_defaults(adaptor_kind(adaptor).options)
        say(*(f"{name}={value}" for name, value in defaults.items()))
        return
    training = TrainingOptions(
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        weight_decay=weight_decay,
        warmup=warmup,
        label_smoothing=label_smoothing,
        patience=patience,
        seed=seed,
        order_seed=order_seed,
        shuffle=shuffle,
        target=target,
        compensation=compensation,
    )
    options = parse_pairs(settings or [], flag="--set", example="rank=4")
    with sigterm_interrupts(), EpochLines() as lines:
        common: dict[str, Any] = {
            "out": out,
            "device": device,
            "resident": resident,
            "progress": lines,
            "note": lines.note,
        }
        if protocol is None and not grid and seeds == 1:
            one = train(store, adaptor, settings=options, **vars(training), **common)
            _print_run(one, adaptor, as_json)
            return
        common |= {"seeds": seeds, "training": training, "settings": options}
        _train_trials(store, adaptor, parse_grid(grid or []), protocol, common, as_json)


def _train_trials(
    store: Path,
    adaptor: str,
    grid: dict[str, list[str]],
    protocol: str | None,
    common: dict[str, Any],
    as_json: bool,
) -> None:
    from coldtap.adaptors import expand_grid, run_protocol, train_trials

    trials = expand_grid(grid)
    if protocol is None:
        _print_trials(train_trials(store, adaptor, trials, **common), adaptor, as_json)
    else:
        result = run_protocol(store, adaptor, trials, protocol=protocol, **common)
        _print_protocol(result, adaptor, protocol, common["out"], as_json)


def _print_run(result: "RunResult", adaptor: str, as_json: bool) -> None:
    info = result.info
    if as_json:
        print(json.dumps({"run": str(result.path), "finished_before": result.was_finished, **info.to_dict()}, indent=1))
        return
    if result.was_finished:
        say(f"{result.path} is finished already; nothing to do")
    scores = ", ".join(f"{split} {metrics.score:.4f}" for split, metrics in info.metrics.items())
    say(
        f"{result.path}: {adaptor}, {info.parameters} parameters, epoch {info.best_epoch} of {info.settings.epochs}: "
        f"{info.metric} {scores}"
    )


def _print_trials(trials: "Trials", adaptor: str, as_json: bool) -> None:
    chosen = {result.plan.name for result in trials.chosen}
    if as_json:
        print(json.dumps(_trials_json(trials, chosen), indent=1))
        return
    from coldtap.adaptors import trials_table

    say(*trials_table(trials).splitlines())
    best = _named(trials.chosen[0].setting.varied)
    say(f"{trials.path}: {len(trials.results)} trials of {adaptor}; chosen on val: {best}")


def _trials_json(trials: "Trials", chosen: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "trial": result.plan.name,
            "chosen": result.plan.name in chosen,
            "failure": result.failure,
            "run": None if result.info is None else result.info.to_dict(),
        }
        for result in trials.results
    ]


def _named(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items()) or "the one setting"


def _print_protocol(result: "ProtocolResult", adaptor: str, protocol: str, out: Path, as_json: bool) -> None:
    from coldtap.adaptors import mean_and_deviation

    if as_json:
        fields = {name: getattr(result, name) for name in result.__slots__}
        print(json.dumps({**fields, "runs": [str(run) for run in result.runs]}, indent=1))
        return
    mean, deviation = mean_and_deviation(result.test)
    say(
        f"{out}: {adaptor} by protocol {protocol}: test {result.metric} {mean:.4f} ± {deviation:.4f} over "
        f"{len(result.test)} seeds; chosen on val ({mean_and_deviation(result.val)[0]:.4f}): {_named(result.setting)}"
    )


def parse_pairs(pairs: list[str], *, flag: str, example: str) -> dict[str, str]:
    """Parse NAME=VALUE options of the command line.

    Raises:
        OptionError: one is not such a pair.
    """
    from coldtap.errors import OptionError

    parsed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"{flag} {pair}: expected NAME=VALUE, such as {example}")
        if name in parsed and flag == "--grid":
            raise OptionError(f"{flag} {pair}: {name} is given twice: put all its values into one, with commas")
        parsed[name] = value
    return parsed


def parse_grid(pairs: list[str]) -> dict[str, list[str]]:
    """Parse NAME=VALUE,VALUE options of the command line.

    Raises:
        OptionError: one is not of that form.
    """
    parsed = parse_pairs(pairs, flag="--grid", example="lr=1e-3,3e-3")
    return {name: [value.strip() for value in values.split(",") if value.strip()] for name, values in parsed.items()}
