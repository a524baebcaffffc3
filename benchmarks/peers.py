"""Who reads in the benchmark of reading: bare loops, coldtap, and the formats that a user would pick instead.

A contestant gives shuffled batches of the same samples, each as one contiguous array, in one process without workers.
All get the same numbers: raw float16, or int8 codes of the same features.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zstandard

from coldtap.stores import StoredArray, open_store
from coldtap.stores.format.chunks import CRC_BYTES
from coldtap.stores.format.manifest import FEATURES
from coldtap.stores.reading.shard_files import ShardFile
from coldtap.stores.storage.local import LocalStorage

BATCH_SIZE = 64
ANNOUNCED = 5  # batches, as in `adaptors/read_ahead.py`, which imports torch
DECODING_THREADS = 2
RAW, CODES = "raw.npy", "codes.npy"  # (sample, tap, token, channel) float16 and int8

type Rows = np.ndarray[Any, np.dtype[np.int64]]
type Batches = Sequence[Rows]


class Reader(Protocol):
    """Opened files of a contestant."""

    def epoch(self, batches: Batches) -> int:
        """Read batches of samples, or as many in an order of its own; returns the samples read."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """How its files are made in a folder that holds `raw.npy`, under which name, and how they are read.

    Attributes:
        module: what must be installed.
        prepare: None where the files are there already.
    """

    files: str
    open: Callable[[Path], Reader]
    module: str = "numpy"
    prepare: Callable[[Path, Path], None] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether its library can be imported."""
        return find_spec(self.module) is not None


def shuffled(n_samples: int, seed: int) -> list[Rows]:
    """An epoch's batches."""
    return np.split(np.random.default_rng(seed).permutation(n_samples), range(BATCH_SIZE, n_samples, BATCH_SIZE))


class Memmap:
    """Fancy indexing, which allocates every batch."""

    def __init__(self, path: Path) -> None:
        self._values = np.load(path, mmap_mode="r")

    def epoch(self, batches: Batches) -> int:
        return sum(len(self._values[batch]) for batch in batches)


class BareCopy:
    """A loop that copies samples into one batch made before."""

    def __init__(self, path: Path) -> None:
        self._values = np.asarray(np.load(path, mmap_mode="r"))  # a plain array: slicing a memmap costs more
        self._out = np.empty((BATCH_SIZE, *self._values.shape[1:]), self._values.dtype)

    def epoch(self, batches: Batches) -> int:
        for batch in batches:
            for place, sample in enumerate(batch.tolist()):
                self._out[place] = self._values[sample]
        return sum(map(len, batches))


class BareDecode:
    """Two threads that decompress a compact store's chunks, which lie in memory, into one batch made before."""

    def __init__(self, path: Path) -> None:
        array = only_array(path)
        self._frames = list(_frames(path, array))
        self._n_bytes = array.spec.chunk_bytes
        self._out = np.empty((BATCH_SIZE, len(self._frames[0]), self._n_bytes), np.uint8)
        self._pool = ThreadPoolExecutor(DECODING_THREADS)
        self._of_thread = threading.local()

    def epoch(self, batches: Batches) -> int:
        for batch in batches:
            places = np.array_split(np.arange(len(batch)), DECODING_THREADS)
            list(self._pool.map(self._decode, places, [batch[part] for part in places]))
        return sum(map(len, batches))

    def _decode(self, places: Rows, samples: Rows) -> None:
        if not hasattr(self._of_thread, "decompressor"):
            self._of_thread.decompressor = zstandard.ZstdDecompressor()
        decompress = self._of_thread.decompressor.decompress
        for place, sample in zip(places.tolist(), samples.tolist(), strict=True):
            for chunk, frame in enumerate(self._frames[sample]):
                self._out[place, chunk] = np.frombuffer(decompress(frame, max_output_size=self._n_bytes), np.uint8)


def _frames(path: Path, array: StoredArray) -> Iterator[list[bytes]]:
    """The compressed chunks of each row, without their checksums."""
    spec, storage = array.spec, LocalStorage(path)
    for block in range(array.n_rows // spec.block_rows):
        name = f"{FEATURES}/{spec.shard_key(block)}"
        index, data = ShardFile(storage, name, spec, block * spec.block_rows).index, storage.get(name, limit=None)
        for offsets, lengths in zip(index.offsets.tolist(), index.lengths.tolist(), strict=True):
            yield [data[offset : offset + length - CRC_BYTES] for offset, length in zip(offsets, lengths, strict=True)]


def only_array(path: Path) -> StoredArray:
    """The array of a store of one array."""
    (array,) = open_store(path).arrays.values()
    return array


class Coldtap:
    """Reads into one batch made before: stored numbers, or float32.

    It tells the kernel of the batches that follow before it reads one, as training does (`adaptors/read_ahead.py`).
    """

    def __init__(self, path: Path, *, floats: bool) -> None:
        self._array = only_array(path)
        self._read = self._array.read_into if floats else self._array.read_stored_into
        self._out = np.empty((BATCH_SIZE, *self._array.row_shape), np.float32 if floats else self._array.spec.dtype)

    def epoch(self, batches: Batches) -> int:
        coming = iter(batches)
        for following in islice(coming, ANNOUNCED):
            self._array.will_need(following)
        for batch in batches:
            if (following := next(coming, None)) is not None:
                self._array.will_need(following)
            self._read(self._out[: len(batch)], batch)
        return sum(map(len, batches))


class Litdata:
    """litdata's own loader over its chunks of 64 MB, in an order of its own."""

    def __init__(self, path: Path) -> None:
        import litdata

        dataset = litdata.StreamingDataset(str(path), shuffle=True)
        self._loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=0)

    def epoch(self, batches: Batches) -> int:
        return sum(len(batch["x"]) for batch in self._loader)


def write_litdata(raw: Path, path: Path) -> None:
    import torch
    from litdata.streaming.writer import BinaryWriter

    path.mkdir()
    writer = BinaryWriter(str(path), chunk_bytes="64MB")
    for number, values in enumerate(np.load(raw, mmap_mode="r")):
        writer[number] = {"x": torch.from_numpy(np.array(values))}
    writer.done()
    writer.merge()


class Mosaic:
    """MosaicML streaming over local shards, in an order of its own."""

    def __init__(self, path: Path) -> None:
        import torch
        from streaming import StreamingDataset

        dataset = StreamingDataset(local=str(path), shuffle=True, batch_size=BATCH_SIZE)
        self._loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE)

    def epoch(self, batches: Batches) -> int:
        return sum(len(batch["x"]) for batch in self._loader)


def write_mosaic(raw: Path, path: Path) -> None:
    from streaming import MDSWriter

    samples = np.load(raw, mmap_mode="r")
    shape = ",".join(map(str, samples.shape[1:]))
    with MDSWriter(out=str(path), columns={"x": f"ndarray:float16:{shape}"}) as writer:
        for values in samples:
            writer.write({"x": np.array(values)})


class HuggingFace:
    """Hugging Face datasets: a saved Arrow table, rows as torch tensors."""

    def __init__(self, path: Path) -> None:
        import datasets
        import torch

        self._dataset = datasets.load_from_disk(str(path)).with_format("torch", dtype=torch.float16)

    def epoch(self, batches: Batches) -> int:
        return sum(len(self._dataset[batch.tolist()]["x"]) for batch in batches)


def write_hugging_face(raw: Path, path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    samples = np.load(raw, mmap_mode="r")
    array = datasets.Array3D if samples.ndim == 4 else datasets.Array2D
    cache = path.with_name(f"{path.name}-cache")
    made = datasets.Dataset.from_generator(
        lambda: ({"x": values} for values in samples),
        features=datasets.Features({"x": array(samples.shape[1:], "float16")}),
        cache_dir=str(cache),
        writer_batch_size=32,
    )
    made.save_to_disk(str(path), max_shard_size="1GB")
    shutil.rmtree(cache)


MEMMAP = "np.memmap, fancy-indexed"
FLOAT16 = "coldtap float16"
FAST = "coldtap int8 fast, codes"
COMPACT = "coldtap int8 compact, codes"
DECODE = "bare loop, two threads, int8 zstd"
LITDATA, MOSAIC, HUGGING_FACE = "litdata", "MosaicML streaming", "HF datasets"

CONTESTANTS = {
    MEMMAP: Contestant(files=RAW, open=Memmap),
    "bare copy loop, float16": Contestant(files=RAW, open=BareCopy),
    "bare copy loop, int8": Contestant(files=CODES, open=BareCopy),
    DECODE: Contestant(files="compact", open=BareDecode),
    FLOAT16: Contestant(files="float16", open=partial(Coldtap, floats=False)),
    FAST: Contestant(files="fast", open=partial(Coldtap, floats=False)),
    COMPACT: Contestant(files="compact", open=partial(Coldtap, floats=False)),
    "coldtap float16, as float32": Contestant(files="float16", open=partial(Coldtap, floats=True)),
    "coldtap int8 fast, as float32": Contestant(files="fast", open=partial(Coldtap, floats=True)),
    "coldtap int8 compact, as float32": Contestant(files="compact", open=partial(Coldtap, floats=True)),
    LITDATA: Contestant(files="litdata", open=Litdata, module="litdata", prepare=write_litdata),
    MOSAIC: Contestant(files="mosaic", open=Mosaic, module="streaming", prepare=write_mosaic),
    HUGGING_FACE: Contestant(files="hf", open=HuggingFace, module="datasets", prepare=write_hugging_face),
}
