"""The picture of a run: losses and accuracy over the epochs, and the epoch that was kept."""

import io
from collections.abc import Sequence

from coldtap.adaptors.run_folder import EpochRecord

BLUE, ORANGE, GREEN = "#2f6db3", "#d9822b", "#2a8f5b"


def draw_curves(epochs: Sequence[EpochRecord], *, best_epoch: int, title: str) -> bytes:
    """Draws a run's curves; returns a PNG."""
    # Imported here: half a second that a process which never draws does not pay. Figure, not pyplot: no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    numbers = [record.epoch for record in epochs]
    marker = "o" if len(epochs) < 15 else ""
    losses.plot(numbers, [record.train_loss for record in epochs], color=BLUE, marker=marker, ms=3, label="train")
    losses.plot(numbers, [record.val_loss for record in epochs], color=ORANGE, marker=marker, ms=3, label="val")
    losses.set(xlabel="epoch", ylabel="mean cross-entropy (nats)", title="Loss")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    percent = [100 * record.val_top1 for record in epochs]
    best = percent[numbers.index(best_epoch)]
    accuracy.plot(numbers, percent, color=ORANGE, marker=marker, ms=3)
    accuracy.axvline(best_epoch, color=GREEN, lw=1, ls="--")
    accuracy.plot([best_epoch], [best], "o", color=GREEN, label=f"kept: epoch {best_epoch}, {best:.1f} %")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy on val (%)", title="Accuracy")
    accuracy.legend(frameon=False, loc="lower right")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    picture = io.BytesIO()
    # "Software" would put matplotlib's version, and so other bytes, into the file.
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
