"""Settings that learnt anew from train and val, as a protocol's second step does, and the search that chose them."""

from collections.abc import Sequence
from dataclasses import dataclass

from coldtap.adaptors.report.model import RunReport
from coldtap.adaptors.report.tables import by_setting, scores_on, searched_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A refitted setting: its runs, one a seed, and those of the search; none where they are not in the report."""

    runs: tuple[RunReport, ...]
    searched: tuple[RunReport, ...]

    @property
    def failed_seeds(self) -> tuple[int, ...]:
        """The seeds with which it came to no end."""
        return self.runs[0].failed_seeds


def refits_of(runs: Sequence[RunReport]) -> list[Refit]:
    """Return the refitted settings among runs, in the order of `by_setting`."""
    groups = (group for group in by_setting(runs) if group[0].is_refit)
    return [Refit(runs=group, searched=searched_of(group[0], runs)) for group in groups]


def refit_of_best(best: Sequence[RunReport], refits: Sequence[Refit]) -> Refit | None:
    """Return the refit of the best setting; without a search the only one, since of several none may be chosen on test.

    None where it has no score on test, or a seed has failed.
    """
    if best:
        found = [refit for refit in refits if refit.searched and refit.searched[0].folder == best[0].folder]
    else:
        found = [refit for refit in refits if len(refits) == 1 and not refit.searched]
    return next((refit for refit in found if scores_on(refit.runs, "test") and not refit.failed_seeds), None)
