"""Peak memory of extraction from a small and from a large source: it must not grow with the number of images."""

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import own_process, peak_bytes, resident_bytes
from benchmarks.pictures import N_CLASSES, encoded_images

SIZES = (2_000, 50_000)
QUICK_SIZES = (256, 1_024)
SIDE = 32
LINES_A_GROUP = 1_000


def measure_memory(*, quick: bool) -> list[dict[str, Any]]:
    """A record a size; `pooled` features, so that the disk is not what is measured."""
    records: list[dict[str, Any]] = []
    for n_images in QUICK_SIZES if quick else SIZES:
        with own_process(OMP_WAIT_POLICY="PASSIVE") as process, tempfile.TemporaryDirectory() as folder:
            record = process.submit(peak_of_extraction, Path(folder), n_images).result()
        record["against_first"] = record["peak_bytes"] / (records[0] if records else record)["peak_bytes"]
        records.append(record)
    return records


def peak_of_extraction(folder: Path, n_images: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    from coldtap import cache_features

    source = folder / "images.parquet"
    _write_parquet(source, n_images)
    cache_features(source, folder / "store", gather=["pooled"], split=["train"])
    return {"n_images": n_images, "peak_bytes": peak_bytes(), "resident_bytes": resident_bytes()}


def _write_parquet(path: Path, n_images: int) -> None:
    files = encoded_images(SIDE)
    schema = pa.schema({"id": pa.string(), "image": pa.binary(), "label": pa.int64(), "split": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, n_images, LINES_A_GROUP):
            numbers = range(start, min(start + LINES_A_GROUP, n_images))
            columns = {
                "id": [f"{number:06d}" for number in numbers],
                "image": [files[number % len(files)] for number in numbers],
                "label": [number % N_CLASSES for number in numbers],
                "split": ["train"] * len(numbers),
            }
            writer.write_table(pa.table(columns, schema=schema))
        val = {"id": ["val"], "image": [files[0]], "label": [0], "split": ["val"]}
        writer.write_table(pa.table(val, schema=schema))
