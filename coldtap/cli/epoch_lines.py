"""The epochs of a training as they end: a bar on a terminal, a line every tenth of them elsewhere; on stderr."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coldtap.cli.errors import in_flags
from coldtap.cli.output import say
from coldtap.text import printable

if TYPE_CHECKING:
    from coldtap.adaptors.training.state import TrialState


class EpochLines:
    """Show the epochs of one run, or of trials that share them; `title` goes before each line."""

    def __init__(self, title: str = "") -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.title = title
        self._bar = Progress(console=Console(stderr=True)) if sys.stderr.isatty() else None
        self._task: Any = None

    def __enter__(self) -> "EpochLines":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a sentence, above the bar where there is one."""
        line = f"{self.title}{in_flags(text)}"
        if self._bar is None:
            say(line, err=True)
        else:
            self._bar.console.print(printable(line), markup=False, highlight=False)

    def __call__(self, trials: "Sequence[TrialState]", *, epoch: int, epochs: int, seconds: float) -> None:
        """Show an epoch."""
        text = f"{self.title}epoch {epoch}/{epochs}  {describe(trials)}"
        if self._bar is None:
            if epoch % max(epochs // 10, 1) == 0 or epoch == epochs:
                say(f"{text}  {seconds:.2f} s", err=True)
            return
        if self._task is None:
            self._task = self._bar.add_task(text, total=epochs)
        self._bar.update(self._task, description=text, completed=epoch, total=epochs)


def describe(trials: "Sequence[TrialState]") -> str:
    """Say how trials stand: of one its last score and its best epoch, of several the best score of all."""
    scored = [trial for trial in trials if trial.records and trial.records[-1].val_score is not None]
    failed = sum(trial.failure is not None for trial in trials)
    if len(trials) == 1 and scored:
        return f"val {scored[0].records[-1].val_score:.4f}  best at {scored[0].best}"
    parts = [f"{len(trials)} trials"] if len(trials) > 1 else []
    if failed:
        parts.append(f"{failed} diverged")
    if scored:
        best = max(scored, key=lambda trial: max(record.val_score or 0 for record in trial.records))
        parts.append(f"best val {max(record.val_score or 0 for record in best.records):.4f} ({best.name})")
    elif trials[0].records:
        parts.append(f"train loss {trials[0].records[-1].train_loss:.4f}")
    return "  ".join(parts)
