"""Error-bounded int8 codes: x̂ = offset + scale · code, with a scale and an offset a tap and channel.

A channel's step follows from its variance and the bound that the user states: a uniform quantiser of step s has the
mean squared error s² / 12 (Bennett 1948), so step² / 12 = variance / SNR. The stored scale is a little smaller than
the step: rounding and float32 arithmetic together then stay within step / 2 of every single value. Values that int8
does not reach are kept beside the codes as they are (`escapes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from coldtap.errors import OptionError

type Array = np.ndarray[Any, Any]
type Floats = np.ndarray[Any, np.dtype[np.float32]]

MAX_CODE = 127
ABSENT_CODE = -128  # the fill value of an absent row; no value has it

DEFAULT_SNR_DB = 30.0
SNR_MARGIN_DB = 0.8  # what the worst channel loses from calibration rows to others (docs/log.md)

# ±127 steps must reach four standard deviations, or ordinary values would need escapes; and a step of four
# standard deviations says nothing about a value any more.
FINEST_STEP, COARSEST_STEP = 4 / MAX_CODE, 4.0

# scale = step · (1 − 2^−8) leaves step / 512 for float32's rounding (u = 2^−24) in x − offset, in the division, in
# scale · code and in the sum: at most 2^7 · u steps each, and 2^14 · u more for an offset of 2^14 steps.
SCALE_OF_STEP = 1 - 2.0**-8
FINEST_STEP_OF_OFFSET = 2.0**-14

LARGEST_SNR_DB = 1000.0  # beyond it (either way) the power overflows; bounds that can be kept lie far inside

TRIM = 1 / 8  # share of values left out at each end before the fence is set: massive tokens are fewer
FENCE = 32.0  # in trimmed standard deviations from the median: what lies beyond does not count as variance


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBound:
    """What the user states: an SNR (dB) in every channel, or the largest error in standard deviations of the channel.

    Raises:
        OptionError: both or none are given, or int8 codes cannot keep the bound, or it would keep nothing.
    """

    snr_db: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if (self.snr_db is None) == (self.max_error is None):
            raise OptionError("give `snr` or `max_error`, one of the two")
        for option, field in (("snr", "snr_db"), ("max_error", "max_error")):
            if (given := getattr(self, field)) is not None:
                # One number, one recipe: 30, 30.0 and numpy's 30 are the same bound.
                object.__setattr__(self, field, _number(option, given))
        step = self.step_of_deviation
        name = f"`snr={self.snr_db:g}`" if self.snr_db is not None else f"`max_error={self.max_error:g}`"
        if not step >= FINEST_STEP:
            raise OptionError(
                f"{name} needs steps of {step:.3g} standard deviations, and int8 reaches ±127 of them: give at most "
                f"`snr={_snr_of(FINEST_STEP):.1f}` or at least `max_error={FINEST_STEP / 2:.3f}`, or `tier='float16'`"
            )
        if step > COARSEST_STEP:
            raise OptionError(
                f"{name} allows steps of {step:.3g} standard deviations, which keep nothing of the features: "
                f"give at least `snr={_snr_of(COARSEST_STEP):.1f}` or at most `max_error={COARSEST_STEP / 2:g}`"
            )

    @property
    def step_of_deviation(self) -> float:
        """The step in standard deviations of a channel."""
        if self.snr_db is not None:
            return sqrt(12 * 10 ** (-(max(self.snr_db, -LARGEST_SNR_DB) + SNR_MARGIN_DB) / 10))
        assert self.max_error is not None
        return 2 * self.max_error

    def to_dict(self) -> dict[str, Any]:
        """Return the bound and the rule that makes scales from it, as the recipe keeps them."""
        stated = (
            {"snr_db": self.snr_db, "margin_db": SNR_MARGIN_DB}
            if self.snr_db is not None
            else {"max_error": self.max_error}
        )
        return {
            "rule": "variance within a fence",
            **stated,
            "trim": TRIM,
            "fence": FENCE,
        }


def _number(option: str, given: object) -> float:
    try:
        value = float(given)  # type: ignore[arg-type] # whatever it is
    except (TypeError, ValueError):
        raise OptionError(f"`{option}={given!r}`: give a number") from None
    if value != value or abs(value) == float("inf"):
        raise OptionError(f"`{option}={given}`: give a finite number")
    return value


def _snr_of(step: float) -> float:
    return float(10 * np.log10(12 / step**2) - SNR_MARGIN_DB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How the codes of an array become numbers.

    Attributes:
        scale, offset: (tap, channel) float32; an array without a tap axis (`sum`) has one tap here.
    """

    scale: Floats
    offset: Floats


def robust_moments(samples: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel without its massive values.

    Values farther from the median than `FENCE` trimmed standard deviations do not count: a few massive tokens would
    else widen the steps of all others. A channel whose trimmed values are all equal (after a ReLU, say) has no fence.

    Args:
        samples: (value, channel) finite.

    Returns:
        mean and variance (channel,) float64.
    """
    samples = np.asarray(samples, np.float64)
    low, median, high = np.quantile(samples, [TRIM, 0.5, 1 - TRIM], axis=0)
    _, trimmed = _moments(samples, (samples >= low) & (samples <= high))
    near = np.abs(samples - median) <= FENCE * np.sqrt(trimmed)
    return _moments(samples, near | (trimmed == 0))


def _moments(samples: Array, counted: Array) -> tuple[Array, Array]:
    n = np.maximum(counted.sum(axis=0), 1)
    mean = np.where(counted, samples, 0).sum(axis=0) / n
    return mean, np.square(np.where(counted, samples - mean, 0)).sum(axis=0) / n


def choose_scaling(samples: Array, bound: ErrorBound) -> Scaling:
    """Fixes the scaling of an array from calibration values.

    A channel without any variance takes the median step of its tap: it says nothing of what may come.

    Args:
        samples: (tap, value, channel) finite.
        bound: what the user states.
    """
    scale, offset = [], []
    for values in samples:
        mean, variance = robust_moments(values)
        step = bound.step_of_deviation * np.sqrt(variance)
        usual = np.median(step[step > 0]) if (step > 0).any() else 1.0
        step = np.where(step > 0, step, usual)
        step = np.maximum(step, FINEST_STEP_OF_OFFSET * np.abs(mean))
        offset.append(mean.astype(np.float32))
        # Where the features fill float32's range no finite scale would do; everything else escapes then.
        scale.append(np.minimum(SCALE_OF_STEP * step, np.finfo(np.float32).max / 256).astype(np.float32))
    return Scaling(scale=np.stack(scale), offset=np.stack(offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class Escapes:
    """Single values beyond the reach of their codes, in ascending order of position.

    Attributes:
        position: (value, axis) uint32: row, place along the tap axis, token, channel.
        value: (value,) float32, exact.
    """

    position: np.ndarray[Any, np.dtype[np.uint32]]
    value: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Values of some rows as codes.

    Attributes:
        codes: (row, tap, token, channel) int8; ±127 where a value escapes.
        escapes: values that the codes do not hold; their rows are those of `codes`.
    """

    codes: np.ndarray[Any, np.dtype[np.int8]]
    escapes: Escapes


def encode(values: Floats, scaling: Scaling) -> Encoded:
    """Encodes values; the pipeline does the same on its device, bit for bit.

    Args:
        values: (row, tap, token, channel) float32, finite.
        scaling: of the array.
    """
    steps = values - scaling.offset[:, None]
    np.divide(steps, scaling.scale[:, None], out=steps)
    np.rint(steps, out=steps)
    beyond = np.empty(0, np.int64)
    # One look at the extremes is cheaper than a mask, and most rows have no escape.
    if steps.size and not (steps.max() <= MAX_CODE and steps.min() >= -MAX_CODE):
        beyond = np.flatnonzero(np.abs(steps) > MAX_CODE)
        np.clip(steps, -MAX_CODE, MAX_CODE, out=steps)
    position = np.stack(np.unravel_index(beyond, values.shape), axis=1).astype(np.uint32)
    escapes = Escapes(position=position, value=values.reshape(-1)[beyond])
    return Encoded(codes=steps.astype(np.int8), escapes=escapes)


def restore_codes(codes: Array, out: Floats, scaling: Scaling) -> None:
    """Writes offset + scale · code in float32; escapes are put in by the caller.

    Args:
        codes: (row, tap, token, channel) int8.
        out: the same shape.
        scaling: of the taps of `codes`.
    """
    np.multiply(codes, scaling.scale[:, None], out=out, dtype=np.float32)
    np.add(out, scaling.offset[:, None], out=out)


def bound_of(scaling: Scaling) -> Array:
    """Return the largest error (tap, channel) that any restored value may have: step / 2, in float64."""
    return scaling.scale.astype(np.float64) / SCALE_OF_STEP / 2


def measure_errors(
    values: Floats, scaling: Scaling, *, prefix_tokens: int, counted: Array | None = None
) -> list[dict[str, Any]]:
    """Return what the codes lose, a tap: the worst channel, prefix and patch tokens apart.

    The signal of a channel is its robust variance over all tokens of these values.

    Args:
        values: (row, tap, token, channel), rows that were not used for calibration.
        scaling: of the array.
        prefix_tokens: tokens before the patches.
        counted: (row, token), true where a value counts in the channels' variance; None for all.
    """
    encoded = encode(values, scaling)
    restored = np.empty(values.shape, np.float32)
    restore_codes(encoded.codes, restored, scaling)
    restored[tuple(encoded.escapes.position.T)] = encoded.escapes.value
    found = worst_channels(values, restored, prefix_tokens=prefix_tokens, counted=counted)
    for place, about in enumerate(found):
        error = np.abs(values[:, place].astype(np.float64) - restored[:, place])
        escaped = encoded.escapes.position[:, 1] == place
        about["largest_error_of_step"] = float((error / (2 * bound_of(scaling)[place])).max())
        about["escaped"] = float(escaped.sum() / error.size)
    return found


def worst_channels(
    values: Floats, restored: Floats, *, prefix_tokens: int, counted: Array | None = None
) -> list[dict[str, Any]]:
    """Return the worst channel of every tap, prefix and patch tokens apart.

    Args:
        values: (row, tap, token, channel) as they were.
        restored: the same as they are kept.
        prefix_tokens: tokens before the patches.
        counted: (row, token), true where a value counts in the channels' variance; None for all.
    """
    found = []
    for place in range(values.shape[1]):
        error = values[:, place].astype(np.float64) - restored[:, place]
        signal = values[:, place].reshape(-1, values.shape[-1]) if counted is None else values[:, place][counted]
        _, variance = robust_moments(signal)
        found.append(
            {
                part: _worst(error[:, tokens], variance)
                for part, tokens in (("patch", slice(prefix_tokens, None)), ("prefix", slice(prefix_tokens)))
                if error[:, tokens].size
            }
        )
    return found


def _worst(error: Array, variance: Array) -> dict[str, Any]:
    """SNR (dB) over the channels that have a variance: the worst with its number, and the median."""
    noise = np.square(error).mean(axis=(0, 1))
    alive = (variance > 0) & (noise > 0)
    if not alive.any():
        return {"worst_snr_db": None, "worst_channel": None, "median_snr_db": None}
    snr = np.where(alive, 10 * np.log10(np.where(alive, variance, 1) / np.where(alive, noise, 1)), np.inf)
    return {
        "worst_snr_db": round(float(snr.min()), 2),
        "worst_channel": int(snr.argmin()),
        "median_snr_db": round(float(np.median(snr[alive])), 2),
    }


def scaling_of_taps(scaling: Scaling, places: Sequence[int]) -> Scaling:
    """Return the scaling of some taps, in the order given."""
    return Scaling(scale=scaling.scale[[*places]], offset=scaling.offset[[*places]])


def describe_bound(scales: Mapping[str, Any]) -> str:
    """Return a recipe's bound in words, such as `30 dB in every channel`."""
    if "snr_db" in scales:
        return f"{scales['snr_db']:g} dB in every channel"
    return f"every error at most {scales['max_error']:g} standard deviations"
