"""CWAC's closed form: against a least-squares solver, merged in any order, with channels that have nothing to fit."""

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldtap.errors import ModelError, OptionError
from coldtap.stores.compensation.channel_affine import (
    RIDGE,
    ChannelAffine,
    ChannelMoments,
    fit_affine,
    fit_gated_affine,
)

SEEDS = st.integers(0, 2**32)
# Largest and smallest powers of ten that float32 features can have and leave room for their spread.
LOG_SCALES = st.floats(-30, 30)
RIDGES = st.sampled_from([0.0, 1e-6, RIDGE, 1e-2, 1.0, 100.0])
N_CHANNELS = 6


def pairs(rng, n, *, log_scale=0.0, log_mean=-30.0, noise=0.3):
    """Quantised and float channels whose slopes are of both signs, and whose means are as large as is asked."""
    x = rng.standard_normal((n, N_CHANNELS))
    y = rng.uniform(-1, 2, N_CHANNELS) * x + noise * rng.standard_normal(x.shape) + rng.standard_normal(N_CHANNELS)
    mean = 10**log_mean * rng.standard_normal(N_CHANNELS)
    return (x + mean) * 10**log_scale, (y + mean) * 10**log_scale


def merged(parts):
    return reduce(add, [ChannelMoments.of(x, y) for x, y in parts])


def require_equal(left, right, x, y):
    """Moments equal within 1e-12 of the second moments of the values: what float64 can keep of sums of them."""
    assert left.n == right.n
    spread_x, spread_y = np.square(x).sum(0), np.square(y).sum(0)
    for name, size in (
        ("mean_x", np.sqrt(spread_x / left.n)),
        ("mean_y", np.sqrt(spread_y / left.n)),
        ("xx", spread_x),
        ("xy", np.sqrt(spread_x * spread_y)),
        ("yy", spread_y),
    ):
        assert (np.abs(getattr(left, name) - getattr(right, name)) <= 1e-12 * size).all(), name


def direct_error(x, y, affine):
    return np.square(y - affine.scale * x - affine.offset).sum(0)


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(3, 60), LOG_SCALES, st.floats(-2, 4))
def test_without_a_ridge_it_is_least_squares(seed, n, log_scale, log_mean):
    x, y = pairs(np.random.default_rng(seed), n, log_scale=log_scale, log_mean=log_mean)
    affine = fit_affine(ChannelMoments.of(x, y), ridge=0)
    for c in range(N_CHANNELS):
        mean = x[:, c].mean()
        columns = np.stack([x[:, c] - mean, np.full(n, x[:, c].std())], axis=1)  # of one size, for the solver's sake
        slope = np.linalg.lstsq(columns, y[:, c])[0][0]
        if slope > 0:
            assert affine.scale[c] == pytest.approx(slope, rel=1e-9, abs=1e-9)
        else:
            assert affine.scale[c] == 1
        level = y[:, c].mean()
        size = np.abs(y[:, c]).max() + np.abs(affine.scale[c] * x[:, c]).max()
        assert affine.scale[c] * mean + affine.offset[c] == pytest.approx(level, abs=1e-12 * size)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(2, 60), LOG_SCALES, st.sampled_from([1e-6, RIDGE, 1e-2, 1.0, 100.0]))
def test_a_ridge_is_one_more_pair_on_the_identity(seed, n, log_scale, ridge):
    """Its rows, √λ to √λ, beside the centred pairs."""
    x, y = pairs(np.random.default_rng(seed), n, log_scale=log_scale)
    scale = fit_affine(ChannelMoments.of(x, y), ridge=ridge).scale
    for c in range(N_CHANNELS):
        a, b = x[:, c] - x[:, c].mean(), y[:, c] - y[:, c].mean()
        pull = np.sqrt(ridge * (b @ b))
        slope = np.linalg.lstsq(np.append(a, pull)[:, None], np.append(b, pull))[0][0]
        assert scale[c] == (pytest.approx(slope, rel=1e-9, abs=1e-9) if slope > 0 else 1)


@settings(max_examples=150, deadline=None)
@given(st.data(), SEEDS, st.integers(1, 40), LOG_SCALES, st.floats(-2, 7))
def test_merging_in_any_split_and_order_is_one_go(data, seed, n, log_scale, log_mean):
    x, y = pairs(np.random.default_rng(seed), n, log_scale=log_scale, log_mean=log_mean)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    parts = data.draw(st.permutations(list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))))
    require_equal(merged(parts), ChannelMoments.of(x, y), x, y)


def test_merging_by_pairs_of_workers_is_one_go():
    x, y = pairs(np.random.default_rng(0), 64, log_mean=5)
    parts = [ChannelMoments.of(a, b) for a, b in zip(np.split(x, 8), np.split(y, 8), strict=True)]
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    require_equal(parts[0], ChannelMoments.of(x, y), x, y)


def test_float32_with_a_large_mean_loses_nothing():
    """Sums of squares in float32 would be off by far more than the variance here."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5000, 3)) + 1e5).astype(np.float32)
    y = (0.5 * x + rng.standard_normal(x.shape)).astype(np.float32)
    affine = fit_affine(merged(zip(np.split(x, 50), np.split(y, 50), strict=True)), ridge=0)
    exact = [np.polyfit(x[:, c].astype(float) - 1e5, y[:, c].astype(float), 1)[0] for c in range(3)]
    np.testing.assert_allclose(affine.scale, exact, rtol=1e-9)


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 40), LOG_SCALES, st.floats(-2, 3), RIDGES)
def test_squared_error_is_the_sum_over_the_pairs(seed, n, log_scale, log_mean, ridge):
    x, y = pairs(np.random.default_rng(seed), n, log_scale=log_scale, log_mean=log_mean)
    moments = ChannelMoments.of(x, y)
    size = np.square(x).sum(0) + np.square(y).sum(0)
    for affine in (ChannelAffine.identity(N_CHANNELS), fit_affine(moments, ridge=ridge)):
        assert (np.abs(moments.squared_error(affine) - direct_error(x, y, affine)) <= 1e-11 * size).all()
        elsewhere = ChannelAffine(scale=2 * affine.scale, offset=affine.offset - 10**log_scale)
        assert (np.abs(moments.squared_error(elsewhere) - direct_error(x, y, elsewhere)) <= 1e-11 * 16 * size).all()


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 40), LOG_SCALES, st.floats(-2, 3), st.floats(0, 3), RIDGES)
def test_it_is_never_worse_than_the_identity_on_its_own_pairs(seed, n, log_scale, log_mean, noise, ridge):
    """Nor when a slope is negative and only the means are mended."""
    x, y = pairs(np.random.default_rng(seed), n, log_scale=log_scale, log_mean=log_mean, noise=noise)
    error = direct_error(x, y, fit_affine(ChannelMoments.of(x, y), ridge=ridge))
    identity = direct_error(x, y, ChannelAffine.identity(N_CHANNELS))
    assert (error <= identity + 1e-12 * (np.square(x).sum(0) + np.square(y).sum(0))).all()


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(3, 40), LOG_SCALES)
def test_a_larger_float_output_has_a_larger_map(seed, n, log_factor):
    """Without a ridge; as far as float32 holds the scale."""
    x, y = pairs(np.random.default_rng(seed), n)
    affine = fit_affine(ChannelMoments.of(x, y), ridge=0)
    fitted = affine.scale != 1
    factor = 10 ** (log_factor / 6)
    scaled = fit_affine(ChannelMoments.of(x, factor * y), ridge=0)
    np.testing.assert_allclose(scaled.scale[fitted], factor * affine.scale[fitted], rtol=1e-9)
    np.testing.assert_allclose(scaled.offset[fitted], factor * affine.offset[fitted], rtol=1e-9, atol=1e-9 * factor)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 40), st.lists(LOG_SCALES, min_size=N_CHANNELS, max_size=N_CHANNELS), RIDGES)
def test_a_channel_depends_neither_on_its_unit_nor_on_the_others(seed, n, log_units, ridge):
    x, y = pairs(np.random.default_rng(seed), n)
    unit = 10 ** np.array(log_units)
    affine = fit_affine(ChannelMoments.of(x, y), ridge=ridge)
    in_units = fit_affine(ChannelMoments.of(unit * x, unit * y), ridge=ridge)
    np.testing.assert_allclose(in_units.scale, affine.scale, rtol=1e-9)
    np.testing.assert_allclose(in_units.offset, unit * affine.offset, rtol=1e-9, atol=0)


def test_a_scale_that_float32_would_call_zero_is_one():
    x = np.random.default_rng(2).standard_normal((50, 1))
    assert fit_affine(ChannelMoments.of(1e30 * x, 1e-30 * x), ridge=0).scale == 1
    assert fit_affine(ChannelMoments.of(1e10 * x, 1e-10 * x), ridge=0).scale == pytest.approx(1e-20)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e30, 1e-30])
@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_dead_channels_get_the_difference_of_the_means(value, ridge):
    """Whether y lives or not; beside live channels, and where most or all of the others are dead too."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((1001, 5)), rng.standard_normal((1001, 5))
    x[:, :4] = np.float32(value)
    y[:, 0] = np.float32(value) * 3
    y[:, 1] *= max(abs(value), 1e-30)
    moments = merged(zip(np.array_split(x, 7), np.array_split(y, 7), strict=True))
    affine = fit_affine(moments, ridge=ridge)
    np.testing.assert_array_equal(affine.scale[:4], 1)
    np.testing.assert_allclose(affine.offset[:4], y.mean(0)[:4] - np.float32(value), rtol=1e-9, atol=1e-15)


def test_the_rounding_of_a_constant_is_no_slope():
    """A quantised channel moves by float32's last bit, with the float output: a slope of 100,000 without care."""
    rng = np.random.default_rng(4)
    y = rng.standard_normal((400, 1))
    x = np.nextafter(np.float32(100), np.where(y > 0, np.inf, 0).astype(np.float32))
    assert len(np.unique(x)) == 2
    assert fit_affine(ChannelMoments.of(x, y), ridge=0).scale == 1


def test_a_channel_that_lost_its_spread_is_drawn_to_one():
    """One code in 4,000 differs, and by a thousandth: its slope of some hundreds is no news of the others."""
    y = np.random.default_rng(5).standard_normal((4000, 1))
    x = np.zeros_like(y)
    x[np.argmax(y)] = 1e-3
    moments = ChannelMoments.of(x, y)
    assert fit_affine(moments, ridge=0).scale > 100
    assert fit_affine(moments).scale == pytest.approx(1, abs=0.01)


def test_a_small_channel_beside_large_ones_keeps_its_slope():
    """As after a LayerNorm with a few massive channels: they do not set the ridge of the others."""
    x = np.random.default_rng(6).standard_normal((500, 5)) * np.array([1e4, 1e4, 1e4, 1, 1e-4])
    scale = fit_affine(ChannelMoments.of(x, 0.8 * x)).scale
    np.testing.assert_allclose(scale, 0.8, rtol=1e-3)


@pytest.mark.parametrize("ridge", [0.0, RIDGE])
def test_negative_slopes_mend_the_means_alone(ridge):
    x = np.random.default_rng(7).standard_normal((200, 3)) + 2
    y = np.stack([-x[:, 0], -1e30 * x[:, 1], np.full(200, 5.0)], axis=1)
    affine = fit_affine(ChannelMoments.of(x, y), ridge=ridge)
    np.testing.assert_array_equal(affine.scale[:2], 1)
    assert 0 < affine.scale[2] <= 1
    np.testing.assert_allclose(affine.offset, y.mean(0) - affine.scale * x.mean(0), rtol=1e-12)


def test_one_pair_mends_the_means_alone():
    affine = fit_affine(ChannelMoments.of([[1.0, 0.0]], [[3.0, 0.0]]), ridge=0)
    np.testing.assert_array_equal(affine.scale, 1)
    np.testing.assert_array_equal(affine.offset, [2, 0])


def folds_of(x, y, n_folds=4):
    return [ChannelMoments.of(a, b) for a, b in zip(np.split(x, n_folds), np.split(y, n_folds), strict=True)]


def test_the_gate_closes_on_noise():
    """Of 400 channels with nothing to mend; the in-sample error of every one of them falls."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((400, 400))
    y = x + 0.5 * rng.standard_normal(x.shape)
    folds = folds_of(x, y)
    ungated, gated = fit_affine(reduce(add, folds)), fit_gated_affine(folds)
    whole, identity = ChannelMoments.of(x, y), ChannelAffine.identity(400)
    assert (whole.squared_error(ungated) < whole.squared_error(identity)).all()
    closed = (gated.scale == 1) & (gated.offset == 0)
    assert 0.75 < closed.mean() < 1
    np.testing.assert_array_equal(gated.scale[~closed], ungated.scale[~closed])
    later = rng.standard_normal((4000, 400))
    later_pairs = ChannelMoments.of(later, later + 0.5 * rng.standard_normal(later.shape))
    lost = [
        later_pairs.squared_error(affine).sum() - later_pairs.squared_error(identity).sum()
        for affine in (ungated, gated)
    ]
    assert 0 < lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.2), (0.8, 0.0), (1.3, -1.0)])
def test_the_gate_opens_on_a_shift(scale, offset):
    rng = np.random.default_rng(9)
    x = rng.standard_normal((4000, 50))
    folds = folds_of(x, scale * x + offset + 0.5 * rng.standard_normal(x.shape))
    gated, ungated = fit_gated_affine(folds), fit_affine(reduce(add, folds))
    np.testing.assert_array_equal(gated.scale, ungated.scale)
    np.testing.assert_array_equal(gated.offset, ungated.offset)
    np.testing.assert_allclose(gated.scale, scale, atol=0.05)
    np.testing.assert_allclose(gated.offset, offset, atol=0.05)


def test_the_gate_closes_on_a_shift_of_one_fold():
    x = np.random.default_rng(10).standard_normal((400, 20))
    y = x.copy()
    y[:100] += 3
    gated = fit_gated_affine(folds_of(x, y))
    np.testing.assert_array_equal(gated.scale, 1)
    np.testing.assert_array_equal(gated.offset, 0)


def test_equal_outputs_need_no_map():
    x = np.random.default_rng(11).standard_normal((400, 5)) + 100
    gated = fit_gated_affine(folds_of(x, x))
    np.testing.assert_array_equal(gated.scale, 1)
    np.testing.assert_array_equal(gated.offset, 0)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.permutations(range(4)))
def test_the_order_of_folds_does_not_matter(seed, order):
    x, y = pairs(np.random.default_rng(seed), 200)
    folds = folds_of(x, y)
    gated, other = fit_gated_affine(folds), fit_gated_affine([folds[i] for i in order])
    np.testing.assert_allclose(other.scale, gated.scale, rtol=1e-11)
    np.testing.assert_allclose(other.offset, gated.offset, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("x", "y"), [(np.zeros((3, 2)), np.zeros((3, 1))), (np.zeros((0, 2)), np.zeros((0, 2))), (np.zeros(3), np.zeros(3))]
)
def test_other_shapes_are_refused(x, y):
    with pytest.raises(OptionError, match=r"pairs have shapes .*; expected one shape \(n, channel\), n ≥ 1"):
        ChannelMoments.of(x, y)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    x, y = np.ones((5, 2)), np.ones((5, 2))
    x[1, 0], y[1, 1], y[4, 0] = bad, bad, np.inf
    with pytest.raises(ModelError, match="2 of 5 pairs hold numbers that are not finite"):
        ChannelMoments.of(x, y)


def test_a_gate_needs_two_folds():
    with pytest.raises(OptionError, match="folds: 1; a held-out gate needs at least 2"):
        fit_gated_affine([ChannelMoments.of(np.ones((3, 2)), np.ones((3, 2)))])


@pytest.mark.parametrize("ridge", [-1e-9, np.nan, np.inf])
def test_ridges_that_cannot_be_are_refused(ridge):
    with pytest.raises(OptionError, match=f"ridge={ridge}; expected a finite number, 0 or more"):
        fit_affine(ChannelMoments.of(np.ones((3, 2)), np.ones((3, 2))), ridge=ridge)
