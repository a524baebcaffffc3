"""`make demo`: handwritten digits become image files, a store, three trained adaptors, a table and a picture.

Each step runs the command that a user would run, in a process of its own, and prints it. A second run reuses what
is there.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from coldtap.cli.main import guarded
from coldtap.stores.reading.store import open_store
from coldtap.text import show_bytes, show_seconds

# Enough for every adaptor to settle on 800 images, and little enough for three minutes on two cores.
EPOCHS = 10
ADAPTORS = ("linear", "mist", "last")


class Places(NamedTuple):
    """What the demo leaves in its folder."""

    digits: Path
    store: Path
    picture: Path
    runs: Mapping[str, Path]

    @classmethod
    def under(cls, out: Path) -> "Places":
        """Return the paths under one folder."""
        runs = {name: out / f"run-{name}" for name in ADAPTORS}
        return cls(digits=out / "digits", store=out / "store", picture=out / "features.png", runs=runs)


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; a second run reuses it.")] = Path("demo-out"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images, for each adaptor.")] = EPOCHS,
) -> None:
    """Cache 1,797 handwritten digits once, train three adaptors from the store, compare their costs."""
    # torch's threads spin while they wait. Where other programs want the cores too, LAST took ten times as long;
    # asleep, they cost a quiet machine little (docs/log.md). Read when torch is loaded, here and in every command.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_demo(out, epochs=epochs)


def run_demo(out: Path, *, epochs: int = EPOCHS, n_images: int | None = None) -> None:
    """Run every step.

    Args:
        out: the folder for images, store, runs and picture.
        epochs: of each training.
        n_images: use that many of the digits; None for all.

    Raises:
        MachineError: scikit-learn is missing.
        SystemExit: a command failed; it has said why.
    """
    from examples.demo.digits import write_digits

    places = Places.under(out)
    _say(f"1. Scikit-learn's handwritten digits as PNG files: {write_digits(places.digits, n_images)}")
    _say("2. The backbone runs over every image once, and its features are kept")
    caching_s = _run_command("cache-features", places.digits, places.store)
    _say("3. Three adaptors learn from the store alone")
    for name, run in places.runs.items():
        _run_command("train-adaptor", places.store, "--adaptor", name, "--epochs", epochs, "--out", run)
    _say("4. A picture of the features, and what it all cost")
    _finish(places, caching_s, epochs)


def _finish(places: Places, caching_s: float, epochs: int) -> None:
    # Imported late: a process that holds torch while it starts another hands its peak memory on (see demo_costs).
    from examples.demo.costs import imports_bytes, measure_backbone, print_costs
    from examples.demo.picture import draw_components

    store = open_store(places.store)
    draw_components(store, places.digits, places.picture)
    baseline = imports_bytes()
    epoch_s = measure_backbone(places.digits)
    print_costs(store, places.runs.values(), backbone_epoch_s=epoch_s, imports=baseline)
    n_train, whole = store.splits["train"], sum(array.bytes_per_row for array in store.arrays.values()) * store.n_rows
    print(
        f"Caching all {store.n_rows:,} images (train, val and test; {show_bytes(whole)}) took "
        f"{show_seconds(caching_s)}, start-up included; less where the store was there already.\n"
        f"The backbone over the {n_train} training images takes {epoch_s:.1f} s (measured on a slice, decoding "
        f"included): without a store, every adaptor pays that in each of its {epochs} epochs.\n"
        f"\nPicture: {places.picture}"
    )


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _run_command(command: str, *arguments: object) -> float:
    """Run one of coldtap's commands, showing it and all that it says; returns seconds."""
    words = [command, *map(str, arguments)]
    print(f"$ {shlex.join(words)}", flush=True)
    return _run([sys.executable, "-m", "coldtap.cli.main", *words])


def _run(words: Sequence[str]) -> float:
    began = time.monotonic()
    if code := subprocess.run(words, check=False).returncode:
        raise SystemExit(code)
    return time.monotonic() - began


if __name__ == "__main__":
    typer.run(guarded(demo))
