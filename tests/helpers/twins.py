"""A store and its float twin: features of one backbone, once through an arithmetic that shifts and scales channels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.synthetic import GEOMETRY, synthetic_store

QUANTISED = {"scheme": "w6a6", "artefact": "a" * 64}
FLOAT_FIELDS = {"weights": "f" * 64, "quantisation": None, "precision": "float32"}
FIELDS = {**FLOAT_FIELDS, "quantisation": QUANTISED}
N_TAPS = 3


@dataclass(frozen=True)
class Twins:
    """`float_features` = offset + scale · `features` + noise, (view, sample, tap, token, channel)."""

    float_store: Path
    store: Path
    float_features: np.ndarray[Any, Any]
    features: np.ndarray[Any, Any]
    scale: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]


def make_twins(
    folder: Path,
    *,
    sizes: dict[str, int] | None = None,
    common: int | None = None,
    float_split: str | None = None,
    noise: float = 0.02,
    massive: float = 0.0,
    float_arguments: dict[str, Any] | None = None,
    views: int = 0,
    targets: Any = None,
    **arguments: Any,
) -> Twins:
    """Both stores of three classes, each a direction of the channels.

    The float one has the first `common` samples, all of them in `float_split` where one is given. A token of every
    seventh sample has the value `massive` in one channel.
    """
    sizes = {"train": 48, "val": 20, "test": 20} if sizes is None else sizes
    splits = [split for split, n in sizes.items() for _ in range(n)]
    rng = np.random.default_rng(0)
    classes = [i % 3 for i in range(len(splits))]
    shape = (views + 1, len(splits), N_TAPS, GEOMETRY.tokens, GEOMETRY.channels)
    floats = (rng.standard_normal(shape) + 3 * np.eye(8)[classes][:, None, None]).astype(np.float32)
    if massive:
        floats[:, ::7, :, 0, 3] = massive
    # An array of a tap and channel each, which a single number for all of them would miss.
    scale = rng.uniform(0.5, 2, (N_TAPS, 8)).astype(np.float32)
    offset = rng.uniform(-4, 4, (N_TAPS, 8)).astype(np.float32)
    features = (floats + noise * rng.standard_normal(shape) - offset[:, None]) / scale[:, None]
    features = features.astype(np.float32)
    common = len(splits) if common is None else common
    targets = classes if targets is None else targets
    synthetic_store(
        folder / "float",
        floats[:, :common],
        targets[:common],
        [float_split or split for split in splits[:common]],
        views=views,
        **{"block_rows": 16, "extractor": FLOAT_FIELDS, **(float_arguments or {})},
    )
    synthetic_store(
        folder / "store", features, targets, splits, views=views, **{"block_rows": 16, "extractor": FIELDS, **arguments}
    )
    return Twins(folder / "float", folder / "store", floats, features, scale, offset)
