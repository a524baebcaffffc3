"""The pictures of runs: losses and score over the epochs, and the epoch that was kept; of trials, all scores in one."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from coldtap.adaptors.runs.record import EpochRecord, RunInfo
from coldtap.adaptors.runs.run_folder import CURVES
from coldtap.stores.storage.contract import Storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#d9822b", "#2a8f5b", "#b0b0b0"


def draw_run(run: Storage, info: RunInfo, epochs: Sequence[EpochRecord], note: Callable[[str], None] | None) -> None:
    """Draw a finished run's curves into its folder, where that is possible."""
    title = f"{info.settings.adaptor} on {PurePath(info.store).name}, {info.parameters:,} parameters"
    draw_picture(run, CURVES, lambda: draw_curves(epochs, best=info.best_epoch, title=title, metric=info.metric), note)


def draw_picture(folder: Storage, name: str, draw: Callable[[], bytes], note: Callable[[str], None] | None) -> None:
    """Write a picture, best effort: what it shows is written already, and no failure to draw may cost that.

    Args:
        folder: Where it goes.
        name: Of the picture.
        draw: Gives its bytes.
        note: Called with a sentence where it was not drawn.
    """
    try:
        folder.put(name, [draw()])
    except Exception as error:
        mend = ": pip install 'coldtap[report]'" if isinstance(error, ImportError) else ""
        if note is not None:
            note(f"{name} was not drawn ({error}){mend}")


def draw_curves(epochs: Sequence[EpochRecord], *, best: int, title: str, metric: str) -> bytes:
    """Draw a run's curves; return a PNG."""
    # Imported here: half a second that a process which never draws does not pay. Figure, not pyplot: no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    numbers = [record.epoch for record in epochs]
    marker = "o" if len(epochs) < 15 else ""
    losses.plot(numbers, [record.train_loss for record in epochs], color=BLUE, marker=marker, ms=3, label="train")
    if epochs[0].val_loss is not None:
        losses.plot(numbers, [record.val_loss for record in epochs], color=ORANGE, marker=marker, ms=3, label="val")
    losses.set(xlabel="epoch", ylabel="mean loss (nats)", title="Loss")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    percent = [100 * record.val_score for record in epochs if record.val_score is not None]
    if percent:
        scores.plot(numbers, percent, color=ORANGE, marker=marker, ms=3)
        scores.axvline(best, color=GREEN, lw=1, ls="--")
        kept = percent[numbers.index(best)]
        scores.plot([best], [kept], "o", color=GREEN, label=f"kept: epoch {best}, {kept:.1f} %")
        scores.legend(frameon=False, loc="lower right")
    else:
        scores.text(0.5, 0.5, "val was learnt from", ha="center", transform=scores.transAxes)
    scores.set(xlabel="epoch", ylabel=f"{metric} on val (%)", title=metric)
    for axes in (losses, scores):
        _tidy(axes)
    figure.suptitle(title)
    return _png(figure)


def draw_trials(
    curves: Mapping[str, Sequence[EpochRecord]], *, chosen: Sequence[str], title: str, metric: str
) -> bytes:
    """Draw the val scores of trials by name, the chosen ones in colour; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, records in sorted(curves.items(), key=lambda item: item[0] in chosen):
        scored = [(record.epoch, 100 * record.val_score) for record in records if record.val_score is not None]
        colour, width, label = (GREEN, 1.8, name) if name in chosen else (GREY, 0.8, None)
        axes.plot(*zip(*scored, strict=True), color=colour, lw=width, label=label)
    if chosen:
        axes.legend(frameon=False, loc="lower right", title="chosen on val")
    axes.set(xlabel="epoch", ylabel=f"{metric} on val (%)", title=title)
    _tidy(axes)
    return _png(figure)


def _tidy(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    # "Software" would put matplotlib's version, and so other bytes, into the file.
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
