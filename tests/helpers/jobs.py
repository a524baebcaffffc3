"""A tiny backbone, tiny sources and the command line in this process, for tests of whole jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from coldtap.cli.main import app
from coldtap.pipeline.cache_report import CacheReport
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.job import cache_features
from coldtap.stores.storage.lock import LOCK_NAME
from tests.helpers.pictures import picture

SMALL = Preprocess(
    height=8, width=8, crop_pct=1.0, crop_mode="squash", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)
TAPS = ("patch", "blocks.0", "blocks.1")


class TinyNet(nn.Module):
    """Three taps of four tokens and four channels from images of 8 pixels; its weights are always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 4, stride=4)
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.norm = nn.LayerNorm(4)
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=noise))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch(images)).mean((2, 3)))


def cache(source: Any, store: Path, **options: Any) -> CacheReport:
    """Cache the features of `TinyNet`, four images a batch."""
    asked = {"model": TinyNet(), "preprocess": SMALL, "tap_names": TAPS, "batch_size": 4, "device": "cpu", **options}
    return cache_features(source, store, **asked)


def in_memory(**sizes: int) -> dict[str, list[tuple[Any, int]]]:
    """Images of noise by split, of two classes in turn: `in_memory(train=8, val=4)`."""
    first = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    return {split: [(picture(int(first[split]) + i), i % 2) for i in range(n)] for split, n in sizes.items()}


def coldtap(*arguments: object) -> Result:
    """Run a command; `exit_code`, `stdout` and `stderr` are apart."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_line(result: Result) -> str:
    """The one line that a failed command leaves on stderr, after what it told before; nothing else went wrong."""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert errors == lines[-1:]
    return errors[0].removeprefix("error: ")


def files(path: Path) -> Mapping[str, bytes]:
    """All files under a folder with their bytes, but for a store's lock, which names a process."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != LOCK_NAME)
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def read(array: Any, rows: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of a stored array as float32."""
    out = np.empty((len(rows), *array.row_shape), np.float32)
    array.read_into(out, rows)
    return out
