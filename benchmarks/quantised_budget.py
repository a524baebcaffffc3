"""What the benchmark of quantised backbones spends, its settings, and the small files that its results are kept in."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coldtap.errors import RunError
from coldtap.pipeline.backbones.integer.ranges import RangeMethod
from coldtap.pipeline.quantisation.ptq.sites import Target
from coldtap.pipeline.quantisation.quantize import Compensation
from coldtap.stores.storage.atomic import write_file

MODEL = "coldtap/vit-reference"
FLOAT = "float"
METHODS: tuple[Compensation, ...] = ("none", "qwt", "cwac")
# The quantiser of every number: QwT's ridge is, block by block, the best on images held out, its official 0 among them.
RANGES: RangeMethod = "least-squares"
REPARAMETERISED = True
SITES: tuple[str, ...] | None = None  # attn.proj and mlp.fc2, or every convolution
TARGET: Target = "local"
# Adaptors and rates are those of benchmarks.results, chosen there on val of float features; nothing is chosen here.
ADAPTORS: dict[str, dict[str, str]] = {"linear": {"pool": "both"}, "mist": {}}
RATES: dict[str, dict[str, float]] = {
    "linear": {
        "blood-cells": 1.6e-2,
        "grocery": 1.6e-2,
        "omniglot-alphabets": 4e-3,
        "pneumonia-xray": 1.6e-2,
        "sign-digits": 1.6e-2,
    },
    "mist": {"blood-cells": 1e-3},
}
OTHER_RATE = 4e-3
# The joint question is asked where quantisation costs something.
CROSSED = ("w6a6", "w4a4")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is spent; `geometries` are models with random weights and their calibration images."""

    sets: tuple[str, ...]
    schemes: tuple[str, ...] = ("w8a8", "w6a6", "w4a4")
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 8
    images: int = 512
    geometries: tuple[tuple[str, int], ...] = (
        ("vit_small_patch16_224", 64),
        ("resnet50", 64),
        ("vit_base_patch16_224", 32),
    )

    def to_dict(self) -> dict[str, Any]:
        """All that decides a number, for the results and for each file of them."""
        quantiser = {"ranges": RANGES, "reparameterised": REPARAMETERISED, "sites": SITES, "target": TARGET}
        fields = {
            **asdict(self),
            "quantiser": quantiser,
            "adaptors": ADAPTORS,
            "rates": RATES,
            "other_rate": OTHER_RATE,
        }
        return json.loads(json.dumps(fields))  # type: ignore[no-any-return]

    def rate(self, adaptor: str, dataset: str) -> float:
        """The learning rate of an adaptor on a set."""
        return RATES[adaptor].get(dataset, OTHER_RATE)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where images and results lie."""

    data: Path
    out: Path

    @property
    def own(self) -> Path:
        """The images of the backbone's own task."""
        return self.data / "pretrain" / "cifar10-jpeg.parquet"

    def dataset(self, name: str) -> Path:
        """A downstream set."""
        return self.data / "downstream" / f"{name}.parquet"

    def float_store(self, name: str) -> Path:
        """Float features of a set, which stay."""
        return self.out / FLOAT / "stores" / name

    def float_run(self, name: str, adaptor: str, seed: int) -> Path:
        """An adaptor that was trained on them, which stays."""
        return self.out / FLOAT / "runs" / f"{name}-{adaptor}-s{seed}"

    def artefact(self, scheme: str, method: str, seed: int) -> Path:
        """A quantised backbone, which stays."""
        return self.out / "artefacts" / f"{scheme}-{method}-s{seed}.safetensors"

    def work(self, cell: str) -> Path:
        """What goes when the cell is done."""
        return self.out / "work" / cell

    def read(self, cell: str, budget: Budget) -> dict[str, Any] | None:
        """The numbers of a cell that is done; None where it is not.

        Raises:
            RunError: they are of another budget.
        """
        path = self._cell(cell)
        if not path.exists():
            return None
        record = json.loads(path.read_bytes())
        asked = budget.to_dict()
        if other := [key for key in _DECIDING if record["budget"][key] != asked[key]]:
            raise RunError(
                f"{path} is of another budget: {'; '.join(f'{k}: {record["budget"][k]} → {asked[k]}' for k in other)}. "
                "Choose another --out"
            )
        return dict(record["found"])

    def write(self, cell: str, budget: Budget, found: Mapping[str, Any]) -> None:
        """Keep the numbers of a cell, whole or not at all."""
        self._cell(cell).parent.mkdir(parents=True, exist_ok=True)
        write_file(self._cell(cell), [json.dumps({"budget": budget.to_dict(), "found": found}, indent=1).encode()])

    def _cell(self, cell: str) -> Path:
        return self.out / "cells" / f"{cell}.json"


# Cells of other schemes, seeds or geometries stand beside each other; sets are inside a cell.
_DECIDING = ("sets", "epochs", "images", "quantiser", "adaptors", "rates", "other_rate")
