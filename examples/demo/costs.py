"""What the demo compares: each adaptor's accuracy and costs, and those of a backbone that runs in every epoch."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from coldtap.adaptors.runs.record import RunInfo
from coldtap.adaptors.runs.run_folder import read_run
from coldtap.stores.reading.array import StoredArray
from coldtap.stores.reading.store import Store
from coldtap.text import show_bytes

SLICE = 256  # images that are enough for a rate
WIDTH = 112

# VmHWM begins anew with every program; `ru_maxrss` begins with the peak of the process that started it.
PRINT_PEAK = """
import coldtap.adaptors.training.train, matplotlib.figure
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def imports_bytes() -> int | None:
    """Return the peak memory of a process that only imports what training imports; None where it cannot be had."""
    result = subprocess.run([sys.executable, "-c", PRINT_PEAK], capture_output=True, text=True, check=False)
    return int(result.stdout) if result.returncode == 0 else None


def measure_backbone(folder: Path) -> float:
    """Measure the seconds that decoding and the backbone take for all training images, from a slice of them."""
    import torch

    from coldtap.pipeline.backbones.backbone import load_backbone
    from coldtap.pipeline.backbones.batch_size import choose_batch_size
    from coldtap.pipeline.images.decode_ahead import Decoder, Sample
    from coldtap.pipeline.images.sources import open_source

    source, backbone, n_threads = open_source(folder), load_backbone("coldtap/vit-reference"), os.cpu_count() or 1
    size = choose_batch_size(backbone)
    train = [sample for sample, split in enumerate(source.listing.splits) if split == "train"]
    samples = [Sample(index) for index in train[: SLICE + size]]
    with Decoder(source=source, preprocess=backbone.preprocess, batch_size=size, n_threads=n_threads) as decoder:
        n_images, began = 0, time.perf_counter()
        for number, batch in enumerate(decoder.batches(samples)):
            backbone(torch.from_numpy(batch.pixels))
            n_images += len(batch.samples)
            if number == 0 and len(samples) > size:  # the first batch warms up
                n_images, began = 0, time.perf_counter()
        return (time.perf_counter() - began) / n_images * len(train)


def print_costs(store: Store, runs: Iterable[Path], *, backbone_epoch_s: float, imports: int | None) -> None:
    """Print the table, a line per adaptor."""
    table = Table(box=SIMPLE_HEAD, title=_title(store), title_justify="left", title_style="bold")
    for column in ("adaptor", "test accuracy", "trainable\nparameters", "bytes read\nper sample", "peak\nmemory"):
        table.add_column(column, justify="left" if column == "adaptor" else "right")
    table.add_column("seconds of training\nfrom the store", justify="right")
    table.add_column("the same, backbone\nrun in every epoch", justify="right")
    for run in runs:
        info = read_run(run)
        assert info is not None, "train-adaptor ended well"
        table.add_row(*_cells(info, store, backbone_epoch_s))
    Console(width=WIDTH, highlight=False).print(table)
    beside = f", of which importing the libraries takes {show_bytes(imports)}" if imports else ""
    print(f"Peak memory is that of the whole training process{beside}.")


def _title(store: Store) -> str:
    splits = ", ".join(f"{n} {split}" for split, n in store.splits.items())
    return f"Handwritten digits ({splits}) on {store.recorded['model']}, {os.cpu_count()} cores"


def _cells(info: RunInfo, store: Store, backbone_epoch_s: float) -> list[str]:
    epochs = info.settings.epochs
    return [
        info.settings.adaptor,
        f"{100 * info.metrics['test'].score:.1f} %",
        f"{info.parameters:,}",
        show_bytes(bytes_read(store.arrays[info.features.array], info.features.taps)),
        show_bytes(info.peak_memory_bytes),
        f"{epochs * info.epoch_seconds:.1f}",
        f"{epochs * (info.epoch_seconds + backbone_epoch_s):.1f}",
    ]


def bytes_read(array: StoredArray, taps: tuple[int, ...]) -> int:
    """Return the bytes of chunks that one sample of some taps takes; `sum` and `pooled` keep a row in one chunk."""
    return array.spec.chunk_bytes * (len(taps) if array.gather == "layers" else 1)
