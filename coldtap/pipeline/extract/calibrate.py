"""The calibration prefix: the first rows of a job, run once before it, for scales and for the forecast."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice

import torch

from coldtap.pipeline.backbones.backbone import Backbone
from coldtap.pipeline.extract.gather import Gathered, gather
from coldtap.pipeline.images.decode_ahead import Decoder, Sample
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.codes import ErrorBound
from coldtap.stores.format.rows import Row, RowPlan
from coldtap.stores.writing.calibration import Calibration, CalibrationSamples


def calibrate(
    backbone: Backbone, decoder: Decoder, specs: Sequence[ArraySpec], plan: RowPlan, bound: ErrorBound | None
) -> Calibration:
    """Run the first rows of the first split; images that cannot be used do not count.

    The rate is that of decoding and backbone, batch after batch, the first (warming) batch left out. At least two
    batches are timed where there are so many rows, so it may come from more rows than the scales.
    """
    rows = plan.first_rows(max(CalibrationSamples.rows_needed(specs, bound), 2 * decoder.batch_size))
    samples = CalibrationSamples(specs, bound, len(rows))
    left = iter(rows)
    times = [time.perf_counter()]
    for batch in decoder.batches([Sample(row.sample, row.view) for row in rows]):
        taps = backbone(torch.from_numpy(batch.pixels))
        usable = {i: row for i, row in enumerate(islice(left, len(batch.samples))) if i not in batch.reasons}
        with torch.inference_mode():
            for part in gather(taps, specs) if usable else ():
                _add(samples, part, usable)
        times.append(time.perf_counter())
    return Calibration(
        numbers=samples.numbers(),
        errors=samples.errors(),
        compressed=samples.compressed(),
        rows_per_second=_rate(times, len(rows), decoder.batch_size),
    )


def _add(samples: CalibrationSamples, part: Gathered[ArraySpec], usable: Mapping[int, Row]) -> None:
    """Take what is needed of one tap of one array, of the usable images of a batch."""
    values = part.values.float() if part.spec.kept_as.is_coded else None
    for image, row in usable.items():
        largest = max(float(part.high[image]), -float(part.low[image]))
        chosen = None
        if values is not None:
            chosen = values[image, samples.tokens(part.spec, row.number)].cpu().numpy()
        samples.add(part.spec.name, part.position or 0, largest, chosen)


def _rate(times: Sequence[float], n_rows: int, batch_size: int) -> float:
    if len(times) > 2:
        return (n_rows - batch_size) / (times[-1] - times[1])
    return n_rows / (times[-1] - times[0])
