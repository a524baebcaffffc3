"""A benchmark's results as a table: a row a dataset, a column an adaptor, and means below.

Two averages of VTAB-1K go about in papers: over the 19 datasets, and over the means of its three groups. They differ by
points, so that both are here, each under its name.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coldtap.adaptors.results.vtab import GROUPS, in_vtab_order, vtab_name
from coldtap.adaptors.training.protocol import mean_and_deviation

DEVIATIONS = (
    "Test scores are means ± standard deviations over seeds of start and dropout, with one order of samples for all."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one adaptor reaches on one dataset, or the reason why there is no result.

    Attributes:
        dataset: Name of the dataset.
        adaptor: Name of the adaptor.
        metric: Name of the deciding score.
        test: Scores in [0, 1] on test, one a seed.
        val: Scores of the chosen setting on val, one a seed that searched.
        setting: What was chosen, by name.
        parameters: Trainable ones.
        bytes_per_sample: Stored bytes that a sample's features take; 0 where none are read.
        seconds: Of training, of all trials.
        failure: Why there is no result; None where there is one.
    """

    dataset: str
    adaptor: str
    metric: str = ""
    test: tuple[float, ...] = ()
    val: tuple[float, ...] = ()
    setting: Mapping[str, object] = field(default_factory=dict)
    parameters: int = 0
    bytes_per_sample: float = 0.0
    seconds: float = 0.0
    failure: str | None = None

    @property
    def chosen(self) -> str:
        """What was chosen: `lr=0.004, rank=8`."""
        return ", ".join(f"{name}={value}" for name, value in self.setting.items()) or "the one setting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Mean and standard deviation (n − 1) over seeds, in [0, 1]."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Return the score of some seeds."""
        mean, deviation = mean_and_deviation(values)
        return cls(mean=mean, deviation=deviation)

    def __str__(self) -> str:
        """In percent: `71.3 ± 0.4`."""
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table: a dataset, or a mean over some of them; None where an adaptor has no score."""

    name: str
    metric: str
    scores: Mapping[str, Score | None]

    @property
    def best(self) -> frozenset[str]:
        """Adaptors with the highest mean."""
        top = self._top
        return frozenset(name for name, score in self.scores.items() if score and top and score.mean == top.mean)

    @property
    def close(self) -> frozenset[str]:
        """Adaptors that are not the best, but within one standard deviation of it."""
        top = self._top
        near = (n for n, score in self.scores.items() if score and top and score.mean >= top.mean - top.deviation)
        return frozenset(near) - self.best

    @property
    def _top(self) -> Score | None:
        return max((score for score in self.scores.values() if score), key=lambda score: score.mean, default=None)


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """Datasets × adaptors, as far as they are done.

    Attributes:
        title: What was compared.
        about: How, a sentence each.
        datasets: In the order of the rows.
        adaptors: In the order of the columns.
        cells: Those that are done, in any order.
    """

    title: str
    about: tuple[str, ...]
    datasets: tuple[str, ...]
    adaptors: tuple[str, ...]
    cells: tuple[Cell, ...]

    def cell(self, dataset: str, adaptor: str) -> Cell | None:
        """Return one cell; None where it is not done yet."""
        return next((cell for cell in self.cells if (cell.dataset, cell.adaptor) == (dataset, adaptor)), None)

    def in_order(self) -> list[Cell]:
        """Return the cells that are done, row by row."""
        places = [self.cell(dataset, adaptor) for dataset in self.rows_in_order() for adaptor in self.adaptors]
        return [cell for cell in places if cell is not None]

    def rows_in_order(self) -> list[str]:
        """Return the datasets in the order of VTAB's tables where all are of VTAB-1K, else as they are."""
        return in_vtab_order(list(self.datasets)) or list(self.datasets)

    def rows(self) -> list[Row]:
        """Return a row a dataset."""
        found = []
        for dataset in self.rows_in_order():
            cells = {adaptor: self.cell(dataset, adaptor) for adaptor in self.adaptors}
            metric = next((cell.metric for cell in cells.values() if cell and cell.metric), "")
            scores = {name: Score.of(cell.test) if cell and cell.test else None for name, cell in cells.items()}
            found.append(Row(name=dataset, metric=metric, scores=scores))
        return found

    def means(self) -> list[Row]:
        """Return the means over datasets, taken a seed each; none for an adaptor that lacks one of them.

        Scores of several metrics, as top1 and mAP, have no mean: each metric then has a row over its own datasets.
        """
        datasets = self.rows_in_order()
        metrics = self._metrics()
        if len(metrics) > 1:
            return [
                self._mean(f"mean of {len(of_metric)} of {len(datasets)} datasets", [of_metric], metric)
                for metric, of_metric in metrics.items()
            ]
        metric = next(iter(metrics), "")
        if in_vtab_order(datasets) is None:
            return [self._mean(_mean_of(datasets), [datasets], metric)]
        groups = {
            f"{name} ({len(chosen)} of {len(members)})": chosen
            for name, members in GROUPS.items()
            if (chosen := [dataset for dataset in datasets if vtab_name(dataset) in members])
        }
        rows = [self._mean(name, [chosen], metric) for name, chosen in groups.items()]
        if len(groups) == len(GROUPS):
            rows.append(self._mean(f"mean of the {len(groups)} group means", list(groups.values()), metric))
        return [*rows, self._mean(_mean_of(datasets), [datasets], metric)]

    def failures(self) -> list[str]:
        """Return the reasons of cells without a result, each once, in the order of the table."""
        return list(dict.fromkeys(cell.failure for cell in self.in_order() if cell.failure))

    def _metrics(self) -> dict[str, list[str]]:
        """The datasets of each metric; those without a result have none."""
        found: dict[str, list[str]] = {}
        for row in self.rows():
            if row.metric:
                found.setdefault(row.metric, []).append(row.name)
        return found

    def _mean(self, name: str, groups: Sequence[Sequence[str]], metric: str) -> Row:
        scores = {}
        for adaptor in self.adaptors:
            by_group = [[self._test(dataset, adaptor) for dataset in group] for group in groups]
            whole = all(tests for group in by_group for tests in group)
            seeds = [
                statistics.mean(values) for values in zip(*(_seed_means(group) for group in by_group), strict=False)
            ]
            scores[adaptor] = Score.of(seeds) if whole and seeds else None
        return Row(name=name, metric=metric, scores=scores)

    def _test(self, dataset: str, adaptor: str) -> tuple[float, ...]:
        cell = self.cell(dataset, adaptor)
        return cell.test if cell else ()


def _mean_of(datasets: Sequence[str]) -> str:
    return f"mean of {len(datasets)} dataset{'s' if len(datasets) > 1 else ''}"


def _seed_means(tests: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(seed) for seed in zip(*tests, strict=False)]
