"""Small real stores, written by the real writer from numbers, for tests that need no backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coldtap.stores.format.arrays import ArraySpec, calibration_rows, plan_arrays
from coldtap.stores.format.codes import ErrorBound, Scaling, choose_scaling
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.journal import Rejection
from coldtap.stores.format.norm import FinalNorm
from coldtap.stores.format.recipe import Recipe
from coldtap.stores.format.rows import RowPlan
from coldtap.stores.format.targets import targets_bytes
from coldtap.stores.format.tiers import Layout, Numbers, TierName, scales_rule
from coldtap.stores.writing.writer import StoreWriter

GEOMETRY = Geometry(grid=(2, 3), prefix_tokens=1, channels=8)


def layer_norm(channels: int) -> FinalNorm:
    weight = np.linspace(0.5, 1.5, channels, dtype=np.float32)
    return FinalNorm(kind="layer_norm", eps=1e-6, weight=weight, bias=weight - 1)


def synthetic_store(
    path: Path,
    features: np.ndarray[Any, Any],
    targets: Sequence[int],
    splits: Sequence[str],
    *,
    geometries: Mapping[int, Geometry] | None = None,
    gathers: Mapping[str, Sequence[int]] | None = None,
    tier: TierName = "float32",
    layout: Layout = "fast",
    snr_db: float = 30,
    scaling: Mapping[str, Scaling] | None = None,
    views: int = 0,
    block_rows: int | None = None,
    rejected: Sequence[int] = (),
    norm: FinalNorm | None = None,
    class_names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    finish: bool = True,
    ranges: Mapping[str, list[list[float]]] | None = None,
    extractor: Mapping[str, Any] | None = None,
    rows: Mapping[str, Any] | None = None,
) -> StoreWriter:
    """A store of given taps: (view, sample, tap, token, channel) or (sample, tap, token, channel) float32.

    Arrays are made by the definitions: sums in float32, pooled from prefix tokens and patch mean. Samples
    whose index is in `rejected` are not there. `blocks` and `finish` leave the store incomplete. `extractor` and `rows`
    are further fields of the recipe.
    """
    values = np.asarray(features, np.float32)
    values = values if values.ndim == 5 else values[None]
    n_taps = values.shape[2]
    geometries = geometries or dict.fromkeys(range(n_taps), GEOMETRY)
    gathers = gathers or {"layers": range(n_taps), "sum": [n_taps - 1], "pooled": range(n_taps)}
    ids = [f"sample-{i:03d}" for i in range(len(targets))]
    specs = plan_arrays(geometries, gathers, tier, layout)
    if block_rows:
        specs = tuple(_with_rows(spec, block_rows) for spec in specs)
    keep = [split for split in ("train", "val", "test") if split in splits]
    plan = RowPlan.of(ids, splits, keep=keep, views=views, seed=0, block_rows=specs[0].block_rows)
    parts = {
        "extractor": {
            "architecture": "synthetic",
            "taps": [{"name": f"z{i}", **g.to_dict()} for i, g in geometries.items()],
            **(extractor or {}),
        },
        "rows": {
            "listing": "0" * 64,
            "views": views,
            "splits": {s: len(o) for s, o in plan.order.items()},
            **(rows or {}),
        },
        "encoding": {
            "gathers": {name: list(taps) for name, taps in gathers.items()},
            "tier": tier,
            "scales": scales_rule(ErrorBound(snr_db=snr_db) if tier == "int8" else None, calibration_rows(specs)),
            "layout": layout,
            "block_rows": specs[0].block_rows,
        },
    }
    recipe = Recipe.from_parts(parts, where=str(path))
    recorded = {"environment": {"device": "none"}, "model": "synthetic", "source": "memory"}
    numbers = {spec.name: _numbers(spec, values[0], ErrorBound(snr_db=snr_db), scaling or {}) for spec in specs}
    writer = StoreWriter.begin(
        path, recipe, specs, plan, recorded=recorded, numbers=numbers, norm=norm or layer_norm(8)
    )
    for block in range(plan.n_blocks) if blocks is None else blocks:
        _write(writer, block, values, rejected, ranges or {})
    if finish:
        writer.finish(ids, lambda i: f"memory[{i}]", {"label": targets_bytes(ids, targets, class_names)})
    return writer


def _with_rows(spec: ArraySpec, block_rows: int) -> ArraySpec:
    return replace(spec, block_rows=block_rows)


def _numbers(spec: ArraySpec, taps: np.ndarray[Any, Any], bound: ErrorBound, given: Mapping[str, Scaling]) -> Numbers:
    if spec.tier != "int8":
        return Numbers(exponents=(0,) * len(spec.taps))
    values = np.stack([by_tap(gathered(spec, sample)) for sample in taps], axis=1)
    samples = values.reshape(len(spec.taps), -1, spec.geometry.channels)
    return Numbers(exponents=(0,) * len(spec.taps), scaling=given.get(spec.name) or choose_scaling(samples, bound))


def by_tap(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array's row with a tap axis: (tap, token, channel)."""
    return values.reshape(-1, *values.shape[-2:])


def _write(
    writer: StoreWriter,
    block: int,
    values: np.ndarray[Any, Any],
    rejected: Sequence[int],
    ranges: Mapping[str, list[list[float]]],
) -> None:
    buffers = writer.new_buffers()
    rows = writer.plan.block(block)
    for row in rows:
        for spec in writer.specs:
            kept = by_tap(gathered(spec, values[row.view, row.sample]))
            buffers[spec.name].put(kept[None], [row.number % spec.block_rows])
    writer.write_block(
        block,
        buffers,
        rejected=[Rejection(row=row.number, reason="made so") for row in rows if row.sample in rejected],
        source_sha256={row.number: f"{row.sample:064x}" for row in rows if row.sample not in rejected},
        ranges=ranges,
        environment={"device": "none"},
    )


def gathered(spec: ArraySpec, taps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What an array holds of one sample's taps (tap, token, channel)."""
    if spec.gather == "sum":
        total = taps[0].copy()
        for tap in taps[1 : spec.taps[0] + 1]:
            total += tap
        return total
    chosen = taps[list(spec.taps)]
    if spec.gather == "layers":
        return chosen
    prefix = spec.geometry.prefix_tokens
    return np.concatenate([chosen[:, :prefix], chosen[:, prefix:].mean(axis=1, keepdims=True)], axis=1)


def encode(values: np.ndarray[Any, Any], tier: TierName) -> np.ndarray[Any, Any]:
    if tier == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(tier)


def three_directions(
    path: Path, *, sizes: Mapping[str, int] | None = None, noise: float = 0.5, **arguments: Any
) -> Path:
    """A store of three classes, each a direction of the channels that all four taps share, in noise."""
    sizes = {"train": 48, "val": 20, "test": 20} if sizes is None else sizes
    splits = [split for split, n in sizes.items() for _ in range(n)]
    rng = np.random.default_rng(0)
    targets = arguments.pop("targets", [i % 3 for i in range(len(splits))])
    views = arguments.get("views", 0) + 1
    features = noise * rng.standard_normal((views, len(splits), 4, GEOMETRY.tokens, GEOMETRY.channels))
    features += 2 * np.eye(8)[targets][:, None, None]
    synthetic_store(path, features, targets, splits, block_rows=16, **arguments)
    return path
