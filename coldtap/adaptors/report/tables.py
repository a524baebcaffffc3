"""What distinguishes the runs of a store, and which setting val chooses, and what was refitted of it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from coldtap.adaptors.report.model import RunReport
from coldtap.adaptors.report.numbers import show_percent

SEEDS = ("seed", "order_seed")


def by_setting(runs: Sequence[RunReport]) -> list[tuple[RunReport, ...]]:
    """Group runs that differ by their seeds alone, the best mean val score first.

    Of equals those that were refitted come first, since the search chose them. A refit follows the setting that it
    refits. Settings of which a seed has failed come after all others with val, and those without val last.
    """
    groups: dict[str, list[RunReport]] = {}
    for run in runs:
        groups.setdefault(_setting(run), []).append(run)

    def rank(group: Sequence[RunReport]) -> tuple[bool, bool, float, bool, bool]:
        searched = groups.get(_setting(group[0], fit="train"), group)
        mean = mean_score(searched, "val")
        is_refitted = _setting(group[0], fit="train+val") in groups
        return mean is None, bool(searched[0].failed_seeds), -(mean or 0.0), not is_refitted, group[0].is_refit

    by_seed = (tuple(sorted(group, key=lambda run: run.settings["seed"])) for group in groups.values())
    return sorted(by_seed, key=rank)


def best_setting(runs: Sequence[RunReport]) -> tuple[RunReport, ...]:
    """Return the runs of the setting that val chooses; none if no run has val, or every setting has a failed seed."""
    first = by_setting(runs)[0]
    return first if mean_score(first, "val") is not None and not first[0].failed_seeds else ()


def searched_of(refit: RunReport, runs: Sequence[RunReport]) -> tuple[RunReport, ...]:
    """Return the runs by which a refit was chosen: they differ in their seeds and in not having learnt from val."""
    wanted = _setting(refit, fit="train")
    return tuple(run for run in runs if _setting(run) == wanted)


def _setting(run: RunReport, **changed: str) -> str:
    settings = {name: value for name, value in {**run.settings, **changed}.items() if name not in SEEDS}
    return repr((run.adaptor, settings, dict(run.options)))


def mean_score(runs: Sequence[RunReport], split: str) -> float | None:
    """Return the mean of the deciding score; None where a run has none on the split."""
    scores = scores_on(runs, split)
    return statistics.mean(scores) if scores else None


def show_scores(runs: Sequence[RunReport], split: str) -> str:
    """Return the mean score of the runs of a setting, with its deviation where there are several: `58.2 ± 0.4 %`."""
    scores = scores_on(runs, split)
    if len(scores) < 2:
        return show_percent(scores[0] if scores else None)
    return f"{100 * statistics.mean(scores):.1f} ± {show_percent(statistics.stdev(scores))}"


def scores_on(runs: Sequence[RunReport], split: str) -> list[float]:
    """Return the deciding score of each run on a split, as fractions; none where a run lacks it."""
    return [run.splits[split].score for run in runs] if all(split in run.splits for run in runs) else []


def differing_settings(runs: Sequence[RunReport]) -> list[dict[str, str]]:
    """Return, for each run, the settings that differ among all runs and the options that differ within its adaptor."""
    settings = _differing([run.settings for run in runs])
    if all(run.settings["order_seed"] == run.settings["seed"] for run in runs):
        settings.discard("order_seed")  # nobody chose it apart
    options = {
        adaptor: _differing([run.options for run in runs if run.adaptor == adaptor])
        for adaptor in {run.adaptor for run in runs}
    }
    return [
        {name: _show(value) for name, value in run.options.items() if name in options[run.adaptor]}
        | {name: _show(value) for name, value in run.settings.items() if name in settings}
        for run in runs
    ]


def join_settings(settings: Mapping[str, str], *, without: Sequence[str] = ()) -> str:
    """`rank=8, lr=0.001`."""
    return ", ".join(f"{name}={value}" for name, value in settings.items() if name not in without)


def _differing(records: Sequence[Mapping[str, Any]]) -> set[str]:
    names = {name for record in records for name in record}
    return {name for name in names if len({repr(record.get(name)) for record in records}) > 1}


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
