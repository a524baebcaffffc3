"""The page: one HTML file that asks nothing of anybody.

No script, no font, no request: a content security policy forbids them, and allows one style by its hash and images
that are in the page itself. Whatever comes from files is escaped by the template engine.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from jinja2 import Environment
from markupsafe import Markup

from coldtap.adaptors.html_page import page_environment
from coldtap.adaptors.report.costs import COSTS, Cost, Point, choose_split, draw_cost, draw_key
from coldtap.adaptors.report.curves import draw_losses, draw_scores
from coldtap.adaptors.report.matrix import MAX_CLASSES, Pair, confused_pairs, draw_matrix
from coldtap.adaptors.report.model import CLASS_SCORES, ClassScore, Mistake, Outcome, Report, RunReport, StoreReport
from coldtap.adaptors.report.numbers import show_bytes, show_percent, show_seconds
from coldtap.adaptors.report.refits import Refit, refit_of_best, refits_of
from coldtap.adaptors.report.svg import element
from coldtap.adaptors.report.tables import SEEDS, best_setting, differing_settings, join_settings, show_scores
from coldtap.version import __version__

MAX_SECTIONS = 30  # runs of a store that have a section of their own, best on val first
MAX_IMAGE_BYTES = 1_500_000  # of the whole page, before base64
MAX_BARS = 20
METRICS = {"top1": "top-1 accuracy", "mAP": "mean average precision", "mIoU": "mean IoU"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnails:
    """Small JPEGs by sample id, and a sentence on what could not be had."""

    images: Mapping[str, bytes]
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bar:
    """One class in the list of classes."""

    of: ClassScore
    picture: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """One mistake with its image, if there is one."""

    of: Mistake
    image: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _RunView:
    """One run as the template shows it."""

    run: RunReport
    anchor: str
    key: Markup
    differs: str
    has_section: bool
    is_best: bool
    pictures: tuple[Markup, ...]
    bars: tuple[_Bar, ...]
    class_score: str
    matrix: Markup | None
    matrix_is_wide: bool
    pairs: tuple[Pair, ...]
    cards: tuple[_Card, ...]
    n_images_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """The setting that val chooses, over its seeds."""

    anchor: str
    name: str
    n_seeds: int
    val: str
    test: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _RefitView:
    """One refitted setting as the template shows it: its runs, and the first of those that chose it."""

    of: Refit
    key: Markup
    differs: str
    views: tuple[_RunView, ...]
    test: str
    searched: _RunView | None
    val: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoreView:
    """One store and its runs as the template shows them; `result` is the refit that the first sentence names."""

    store: StoreReport
    title: str
    metric: str
    split: str | None
    costs: tuple[tuple[Cost, Markup], ...]
    looks: tuple[tuple[str, Markup], ...]
    views: tuple[_RunView, ...]
    refits: tuple[_RefitView, ...]
    best: _Best | None
    result: _RefitView | None
    note: str | None


def wanted_images(store: StoreReport) -> list[str]:
    """Sample ids whose images the page would show, each once, the best run's first."""
    outcomes = [run.outcome for run in store.runs[:MAX_SECTIONS]]
    shown = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    return list(dict.fromkeys(mistake.sample_id for outcome in shown for mistake in outcome.mistakes))


def render_page(report: Report, thumbnails: Sequence[Thumbnails]) -> str:
    """Return the page.

    Args:
        report: What is on it.
        thumbnails: One for each store of the report.
    """
    budget = _ByteBudget(MAX_IMAGE_BYTES)
    adaptors = list(dict.fromkeys(run.adaptor for run in report.runs))
    looks = {adaptor: number for number, adaptor in enumerate(adaptors)}
    counter = iter(range(1, len(report.runs) + 1))
    stores = [
        _store_view(store, images, looks, budget, [f"run-{next(counter)}" for _ in store.runs])
        for store, images in zip(report.stores, thumbnails, strict=True)
    ]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=_title(report, stores),
            stores=stores,
            unfinished=report.unfinished,
            n_runs=len(report.runs),
            version=__version__,
        )
    )


class _ByteBudget:
    """What is left of the bytes that images may take."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def take(self, image: bytes | None) -> str | None:
        """Return the image as a data URI, while there is room."""
        if image is None or len(image) > self.n_bytes:
            return None
        self.n_bytes -= len(image)
        return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def _environment() -> Environment:
    environment = page_environment(str(__package__))
    environment.globals |= {"metrics": METRICS, "most_classes": MAX_CLASSES, "most_bars": MAX_BARS}
    environment.filters |= {
        "percent": show_percent,
        "size": show_bytes,
        "duration": show_seconds,
        "sentence": _sentence,
    }
    return environment


def _sentence(words: str) -> str:
    """Words with a capital first; Jinja's own filter would make `IoU` small."""
    return words[:1].upper() + words[1:]


def _title(report: Report, stores: Sequence[_StoreView]) -> str:
    n = len(report.runs)
    what = report.runs[0].adaptor if n == 1 else f"{n} runs"
    return f"{what} on {stores[0].title if len(stores) == 1 else f'{len(stores)} stores'}"


def _store_view(
    store: StoreReport, thumbnails: Thumbnails, looks: Mapping[str, int], budget: _ByteBudget, anchors: Sequence[str]
) -> _StoreView:
    split = choose_split(store.runs)
    best = best_setting(store.runs) if len(store.runs) > 1 else ()
    differing = differing_settings(store.runs)
    views = [
        _run_view(
            run,
            anchor=anchor,
            look=looks[run.adaptor],
            differs=join_settings(differs, without=() if run.is_refit else ("fit",)),
            has_section=i < MAX_SECTIONS,
            is_best=i < len(best),
            thumbnails=thumbnails,
            budget=budget,
        )
        for i, (run, anchor, differs) in enumerate(zip(store.runs, anchors, differing, strict=True))
    ]
    points = [
        Point(
            run=view.run,
            look=looks[view.run.adaptor],
            href=f"#{view.anchor}" if view.has_section else f"#{view.anchor}-row",
        )
        for view in views
        if split in view.run.splits
    ]
    several = split is not None and len(points) > 1
    drawn = [(cost, draw_cost(cost, points, str(split))) for cost in COSTS] if several else []
    used = dict.fromkeys(run.adaptor for run in store.runs)
    refits = [_refit_view(refit, views, differing) for refit in refits_of(store.runs)]
    result = refit_of_best(best, [refit.of for refit in refits]) if len(store.runs) > 1 else None
    name = PurePath(store.path).name
    return _StoreView(
        store=store,
        title=name if store.target == "label" else f"{name}, {store.target}",
        metric=METRICS.get(store.runs[0].metric, store.runs[0].metric),
        split=split,
        costs=tuple((cost, picture) for cost, picture in drawn if picture is not None),
        looks=tuple((adaptor, draw_key(looks[adaptor])) for adaptor in used),
        views=tuple(views),
        refits=tuple(refits),
        best=_best(best, anchors[0], join_settings(differing[0], without=(*SEEDS, "fit"))) if best else None,
        result=next((refit for refit in refits if refit.of is result), None),
        note=thumbnails.note,
    )


def _refit_view(refit: Refit, views: Sequence[_RunView], differing: Sequence[Mapping[str, str]]) -> _RefitView:
    folders = [run.folder for run in refit.runs]
    own = [number for number, view in enumerate(views) if view.run.folder in folders]
    return _RefitView(
        of=refit,
        key=views[own[0]].key,
        differs=join_settings(differing[own[0]], without=(*SEEDS, "fit")),
        views=tuple(views[number] for number in own),
        test=show_scores(refit.runs, "test"),
        searched=next((view for view in views if view.run.folder == refit.searched[0].folder), None)
        if refit.searched
        else None,
        val=show_scores(refit.searched, "val"),
    )


def _best(runs: Sequence[RunReport], anchor: str, differs: str) -> _Best:
    return _Best(
        anchor=anchor,
        name=f"{runs[0].adaptor} ({differs})" if differs else runs[0].adaptor,
        n_seeds=len(runs),
        val=show_scores(runs, "val"),
        test=show_scores(runs, "test") if all("test" in run.splits for run in runs) else None,
    )


def _run_view(
    run: RunReport,
    *,
    anchor: str,
    look: int,
    differs: str,
    has_section: bool,
    is_best: bool,
    thumbnails: Thumbnails,
    budget: _ByteBudget,
) -> _RunView:
    outcome = run.outcome if has_section and isinstance(run.outcome, Outcome) else None
    pictures = (draw_losses(run), draw_scores(run)) if has_section and run.epochs else ()
    matrix = draw_matrix(outcome) if outcome else None
    cards = _cards(outcome, thumbnails, budget) if outcome else ()
    return _RunView(
        run=run,
        anchor=anchor,
        key=draw_key(look),
        differs=differs,
        has_section=has_section,
        is_best=is_best,
        pictures=tuple(picture for picture in pictures if picture is not None),
        bars=_bars(outcome, run) if outcome else (),
        class_score=CLASS_SCORES[outcome.kind] if outcome else "",
        matrix=matrix[0] if matrix else None,
        matrix_is_wide=matrix is not None and matrix[1],
        pairs=tuple(confused_pairs(outcome)) if outcome else (),
        cards=cards,
        n_images_left_out=sum(card.image is None and card.of.sample_id in thumbnails.images for card in cards),
    )


def _cards(outcome: Outcome, thumbnails: Thumbnails, budget: _ByteBudget) -> tuple[_Card, ...]:
    return tuple(
        _Card(of=mistake, image=budget.take(thumbnails.images.get(mistake.sample_id))) for mistake in outcome.mistakes
    )


def _bars(outcome: Outcome, run: RunReport) -> tuple[_Bar, ...]:
    """Classes by their score, the worst first; those without samples last."""
    worst_first = sorted(outcome.classes, key=lambda score: (score.score is None, score.score))
    whole = run.splits[outcome.split].score if outcome.split in run.splits else None
    return tuple(_Bar(of=score, picture=_draw_bar(score.score, whole)) for score in worst_first)


def _draw_bar(share: float | None, whole: float | None) -> Markup:
    """A bar from 0 to 1 with a mark at the score of all classes; the number beside it says the same."""
    track = element("rect", width=100, height=10, class_="track")
    fill = element("rect", width=100 * (share or 0.0), height=10, class_="fill")
    mark = element("path", d=f"M{100 * whole:.1f} 0v10", class_="mark") if whole is not None else Markup("")
    return element(
        "svg", track, fill, mark, viewBox="0 0 100 10", preserveAspectRatio="none", class_="bar", aria_hidden="true"
    )
