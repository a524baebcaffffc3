"""The calibration prefix: the first rows of a job, run once before it, for scales and for the forecast."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coldtap.pipeline.backbone import Backbone
from coldtap.pipeline.decode_ahead import Decoder
from coldtap.pipeline.gather import gather
from coldtap.stores.arrays import ArraySpec
from coldtap.stores.rows import RowPlan
from coldtap.stores.tiers import float16_exponent

CALIBRATION_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the prefix showed.

    Attributes:
        exponents: float16 exponent of each tap of each array; zeros in other tiers.
        rows_per_second: decoding and backbone, batch after batch, the first (warming) batch left out.
    """

    exponents: dict[str, list[int]]
    rows_per_second: float


def calibrate(backbone: Backbone, decoder: Decoder, specs: Sequence[ArraySpec], plan: RowPlan) -> Calibration:
    """Run the first rows of the first block; images that cannot be used do not count.

    At least two batches are timed where the block has them, so the rate may come from more rows than the scales.
    """
    rows = plan.block(0)
    rows = rows[: max(CALIBRATION_ROWS, 2 * decoder.batch_size)]
    largest = {spec.name: [0.0] * len(spec.taps) for spec in specs}
    seen, times = 0, [time.perf_counter()]
    for batch in decoder.batches(rows):
        taps = backbone(torch.from_numpy(batch.pixels))
        usable = [i for i in range(len(batch.rows)) if i not in batch.reasons][: max(CALIBRATION_ROWS - seen, 0)]
        seen += len(usable)
        with torch.inference_mode():
            for part in gather(taps, specs) if usable else ():
                extremes = torch.maximum(part.high, -part.low)[usable]
                finite = extremes[extremes.isfinite()]
                place = part.position or 0
                top = float(finite.max()) if len(finite) else 0.0
                largest[part.array][place] = max(largest[part.array][place], top)
        times.append(time.perf_counter())
    return Calibration(
        exponents={
            spec.name: [float16_exponent(top) if spec.tier == "float16" else 0 for top in largest[spec.name]]
            for spec in specs
        },
        rows_per_second=_rate(times, len(rows), decoder.batch_size),
    )


def _rate(times: Sequence[float], n_rows: int, batch_size: int) -> float:
    if len(times) > 2:
        return (n_rows - batch_size) / (times[-1] - times[1])
    return n_rows / (times[-1] - times[0])
