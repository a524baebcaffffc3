"""QwT's closed form: against a least-squares solver, merged in any order, on columns that spoil normal equations.

And the diagnostic that stands on it: the full matrix of post-compensation against its diagonal.
"""

from functools import reduce
from math import inf
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.quantisation.compensation.linear_map import (
    LinearMap,
    LinearMoments,
    fit_gated_linear_map,
    fit_linear_map,
)
from coldtap.pipeline.quantisation.diagnosis.near_diagonal import near_diagonal
from coldtap.stores.compensation.channel_affine import ChannelMoments, fit_affine

N_IN, N_OUT = 5, 3
SEEDS = st.integers(0, 2**32)
LOG_SCALES = st.floats(-15, 15)
# Of columns beside each other: none so much smaller than the middle one that it counts as quiet.
LOG_UNITS = st.tuples(st.lists(st.floats(-0.5, 0.5), min_size=N_IN, max_size=N_IN), LOG_SCALES).map(
    lambda drawn: [unit + drawn[1] for unit in drawn[0]]
)
RIDGES = [0.0, 1e-4, 1e-2, 1.0]


def moments_of(x, r):
    return LinearMoments.of(torch.from_numpy(x), torch.from_numpy(r))


def merged(parts):
    return reduce(add, [moments_of(x, r) for x, r in parts])


def folds_of(x, r, n_folds=4):
    return [moments_of(a, b) for a, b in zip(np.split(x, n_folds), np.split(r, n_folds), strict=True)]


def pairs(rng, n, *, noise=0.3):
    """Inputs with means, and a residual that follows them."""
    x = rng.standard_normal((n, N_IN)) + 3 * rng.standard_normal(N_IN)
    r = x @ rng.standard_normal((N_IN, N_OUT)) + rng.standard_normal(N_OUT) + noise * rng.standard_normal((n, N_OUT))
    return x, r


def predicted(x, linear_map):
    return x @ linear_map.weight.numpy() + linear_map.bias.numpy()


def direct_error(x, r, linear_map):
    return np.square(r - predicted(x, linear_map)).sum()


def solved(x, r, ridge):
    """The same by numpy's solver: unit columns, centred, rows √ridge to 0; returns what it predicts."""
    centred = x - x.mean(0)
    size = np.sqrt(np.square(centred).sum(0))
    unit = centred / np.where(size > 0, size, 1)
    rows = np.concatenate([unit, np.sqrt(ridge) * np.eye(x.shape[1])])
    targets = np.concatenate([r - r.mean(0), np.zeros((x.shape[1], r.shape[1]))])
    return unit @ np.linalg.lstsq(rows, targets)[0] + r.mean(0)


def require_equal(left, right, x, r):
    """Moments equal within 1e-12 of the second moments of the values: what float64 can keep of sums of them."""
    assert left.n == right.n
    size_x, size_r = np.sqrt(np.square(x).sum(0)), np.sqrt(np.square(r).sum(0))
    for name, size in (
        ("mean_x", size_x),
        ("mean_r", size_r),
        ("xx", np.outer(size_x, size_x)),
        ("xr", np.outer(size_x, size_r)),
        ("rr", size_r**2),
    ):
        assert (np.abs((getattr(left, name) - getattr(right, name)).numpy()) <= 1e-12 * size).all(), name


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(N_IN + 2, 60), LOG_UNITS, LOG_SCALES)
def test_without_a_ridge_it_is_least_squares(seed, n, log_units, log_scale):
    """With numpy's own column of ones for the bias; columns of any size beside each other."""
    x, r = pairs(np.random.default_rng(seed), n)
    unit, scale = 10 ** np.array(log_units), 10**log_scale
    exact = np.linalg.lstsq(np.column_stack([x, np.ones(n)]), r)[0]
    condition = np.linalg.cond(x - x.mean(0))
    linear_map = fit_linear_map(moments_of(unit * x, scale * r), ridge=0)
    found = np.vstack([unit[:, None] * linear_map.weight.numpy(), linear_map.bias.numpy()]) / scale
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-13 * condition**2 * np.abs(exact).max())


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 60), LOG_UNITS, st.sampled_from(RIDGES[1:]))
def test_a_ridge_is_one_more_row_a_column(seed, n, log_units, ridge):
    """Of the columns in one unit; also with fewer pairs than columns."""
    x, r = pairs(np.random.default_rng(seed), n)
    unit = 10 ** np.array(log_units)
    linear_map = fit_linear_map(moments_of(unit * x, r), ridge=ridge)
    np.testing.assert_allclose(
        predicted(unit * x, linear_map), solved(x, r, ridge), rtol=0, atol=1e-9 * np.abs(r).max()
    )


def test_a_channel_that_is_hardly_ever_active_gets_no_weight():
    """The few values that it had say nothing of the next images."""
    x, r = pairs(np.random.default_rng(0), 40)
    x[:, 1] *= 1e-4
    linear_map = fit_linear_map(moments_of(x, r), ridge=0)
    assert not linear_map.weight[1].any()
    others = [0, *range(2, N_IN)]
    alone = fit_linear_map(moments_of(x[:, others], r), ridge=0)
    torch.testing.assert_close(linear_map.weight[others], alone.weight)
    torch.testing.assert_close(linear_map.bias, alone.bias)


def test_a_weight_is_rounded_to_what_it_will_be_kept_in_and_the_bias_is_that_of_the_rounded_one():
    x, r = pairs(np.random.default_rng(0), 40)
    exact, kept = (fit_linear_map(moments_of(x, r), ridge=0, weight_dtype=kind) for kind in (torch.float64, torch.half))
    assert torch.equal(kept.weight, exact.weight.half().double())
    assert not torch.equal(kept.weight, exact.weight)
    np.testing.assert_allclose(predicted(x, kept).mean(0), r.mean(0), rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.data(), SEEDS, st.integers(1, 40), LOG_SCALES, st.floats(-2, 6))
def test_merging_in_any_split_and_order_is_one_go(data, seed, n, log_scale, log_mean):
    x, r = pairs(np.random.default_rng(seed), n)
    x, r = (x + 10**log_mean) * 10**log_scale, (r - 10**log_mean) / 10**log_scale
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    parts = data.draw(st.permutations(list(zip(np.split(x, cuts), np.split(r, cuts), strict=True))))
    require_equal(merged(parts), moments_of(x, r), x, r)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 40), LOG_SCALES, st.sampled_from(RIDGES))
def test_squared_error_is_the_sum_over_the_pairs(seed, n, log_scale, ridge):
    rng = np.random.default_rng(seed)
    x, r = pairs(rng, n)
    x, r = x * 10**log_scale, r / 10**log_scale
    moments = moments_of(x, r)
    elsewhere = LinearMap(
        weight=torch.from_numpy(rng.standard_normal((N_IN, N_OUT))) / 10 ** (2 * log_scale),
        bias=torch.from_numpy(rng.standard_normal(N_OUT)) / 10**log_scale,
    )
    for linear_map in (LinearMap.zero(N_IN, N_OUT), elsewhere, fit_linear_map(moments, ridge=ridge)):
        parts = np.abs(x) @ linear_map.weight.abs().numpy() + linear_map.bias.abs().numpy() + np.abs(r)
        size = np.square(parts).sum()
        assert moments.squared_error(linear_map) == pytest.approx(direct_error(x, r, linear_map), abs=1e-12 * size)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 40), st.floats(0, 10), st.sampled_from(RIDGES))
def test_it_is_never_worse_than_nothing_on_its_own_pairs(seed, n, noise, ridge):
    x, r = pairs(np.random.default_rng(seed), n, noise=noise)
    error = direct_error(x, r, fit_linear_map(moments_of(x, r), ridge=ridge))
    assert error <= np.square(r - r.mean(0)).sum() + 1e-9 * np.square(r).sum() <= np.square(r).sum() * (1 + 1e-8)


@settings(max_examples=50, deadline=None)
@given(SEEDS, LOG_SCALES, st.sampled_from(RIDGES))
def test_a_larger_residual_has_a_larger_map(seed, log_scale, ridge):
    """At every ridge: its measure is the input."""
    x, r = pairs(np.random.default_rng(seed), 50)
    linear_map, scaled = (fit_linear_map(moments_of(x, k * r), ridge=ridge) for k in (1, 10**log_scale))
    np.testing.assert_allclose(scaled.weight / 10**log_scale, linear_map.weight, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scaled.bias / 10**log_scale, linear_map.bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", RIDGES)
def test_outlier_columns_cost_the_others_nothing(ridge):
    """10,000 times larger, as massive channels of a transformer are: the same map in their unit."""
    x, r = pairs(np.random.default_rng(0), 300)
    unit = np.array([1, 1e4, 1, 1e4, 1])
    plain = fit_linear_map(moments_of(x, r), ridge=ridge)
    outlier = fit_linear_map(moments_of(unit * x, r), ridge=ridge)
    np.testing.assert_allclose(unit[:, None] * outlier.weight.numpy(), plain.weight, rtol=1e-9)
    np.testing.assert_allclose(outlier.bias, plain.bias, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ridge", RIDGES)
def test_collinear_columns_share_their_weight(dtype, ridge):
    """A copy, a multiple, and a sum that float32 rounds: no crash, no weight beyond that of the columns alone."""
    rng = np.random.default_rng(1)
    x, r = pairs(rng, 400)
    x = x.astype(dtype)
    collinear = np.column_stack([x, x[:, 0], -1e4 * x[:, 1], x[:, 2] + x[:, 3]])
    alone = fit_linear_map(moments_of(x, r), ridge=ridge)
    linear_map = fit_linear_map(moments_of(collinear, r), ridge=ridge)
    assert linear_map.weight.abs().max() < 1.1 * alone.weight.abs().max()
    if ridge == 0:
        np.testing.assert_allclose(predicted(collinear, linear_map), predicted(x, alone), rtol=0, atol=1e-5)
        np.testing.assert_allclose(linear_map.weight[0], linear_map.weight[5], rtol=1e-4)


def test_fewer_pairs_than_columns_are_met_exactly_and_no_further():
    rng = np.random.default_rng(2)
    x, r = rng.standard_normal((6, 20)), rng.standard_normal((6, N_OUT))
    linear_map = fit_linear_map(moments_of(x, r), ridge=0)
    np.testing.assert_allclose(predicted(x, linear_map), r, atol=1e-9)
    assert linear_map.weight.norm() < 5


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e30])
@pytest.mark.parametrize("ridge", RIDGES)
def test_columns_that_do_not_vary_get_no_weight(value, ridge):
    """Nor does the rounding of their means, and the others are what they are without them."""
    x, r = pairs(np.random.default_rng(3), 301)
    constant = np.full((301, 1), np.float32(value), np.float64)
    widened = np.column_stack([x[:, :2], constant, x[:, 2:], constant])
    linear_map = fit_linear_map(merged(zip(np.array_split(widened, 7), np.array_split(r, 7), strict=True)), ridge=ridge)
    alone = fit_linear_map(moments_of(x, r), ridge=ridge)
    np.testing.assert_array_equal(linear_map.weight[[2, 6]], 0)
    np.testing.assert_allclose(linear_map.weight[[0, 1, 3, 4, 5]], alone.weight, rtol=1e-9)
    np.testing.assert_allclose(linear_map.bias, alone.bias, rtol=1e-9)


def test_the_rounding_of_a_constant_is_no_column():
    """It moves by float32's last bit, with the residual: all of it would be explained, with a weight of 100,000."""
    r = np.random.default_rng(18).standard_normal((400, 1))
    x = np.nextafter(np.float32(100), np.where(r > 0, np.inf, 0).astype(np.float32))
    assert len(np.unique(x)) == 2
    np.testing.assert_array_equal(fit_linear_map(moments_of(x, r), ridge=0).weight, 0)


@pytest.mark.parametrize("n", [1, 50])
def test_nothing_that_varies_leaves_the_bias(n):
    r = np.random.default_rng(4).standard_normal((n, N_OUT))
    linear_map = fit_linear_map(moments_of(np.ones((n, N_IN)), r), ridge=0)
    np.testing.assert_array_equal(linear_map.weight, 0)
    np.testing.assert_allclose(linear_map.bias, r.mean(0))


@pytest.mark.parametrize("ridge", [1e-2, 1.0, 1e6])
def test_no_ridge_touches_the_bias(ridge):
    x, r = pairs(np.random.default_rng(5), 100)
    linear_map = fit_linear_map(moments_of(x, r + 1000), ridge=ridge)
    np.testing.assert_allclose(predicted(x, linear_map).mean(0), r.mean(0) + 1000, rtol=1e-12)


def test_float32_activations_with_a_large_mean_lose_nothing():
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((2000, 3)) + 1e5).astype(np.float32)
    r = (x.astype(np.float64) - 1e5) @ np.array([[0.5], [-1], [2]]) + 7
    linear_map = fit_linear_map(moments_of(x, r), ridge=0)
    np.testing.assert_allclose(linear_map.weight[:, 0], [0.5, -1, 2], rtol=1e-9)
    np.testing.assert_allclose(predicted(x.astype(np.float64), linear_map), r, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_dtype_is_summed_in_float64(dtype):
    """And the caller's tensors stay as they were, float64 ones too."""
    x, r = (torch.from_numpy(part) for part in pairs(np.random.default_rng(7), 40))
    low, before = x.to(dtype), x.clone()
    of_low, of_double = LinearMoments.of(low, r), LinearMoments.of(low.double(), r)
    assert of_low.xx.dtype == torch.float64
    assert torch.equal(of_low.xx, of_double.xx)
    LinearMoments.of(x, r)
    assert torch.equal(x, before)


def test_the_gate_closes_on_noise():
    """With fewer pairs than make an empty fit harmless."""
    rng = np.random.default_rng(8)
    x, r = rng.standard_normal((80, 20)), rng.standard_normal((80, 10))
    assert moments_of(x, r).squared_error(fit_linear_map(moments_of(x, r), ridge=0)) < 0.85 * np.square(r).sum()
    assert fit_gated_linear_map(folds_of(x, r), ridges=RIDGES) is None


def test_the_gate_closes_on_a_shift_of_one_fold():
    x, r = np.random.default_rng(9).standard_normal((80, 3)), np.zeros((80, 2))
    r[:20] = 3
    assert fit_gated_linear_map(folds_of(x, r), ridges=RIDGES) is None


def test_no_residual_needs_no_map():
    x = np.random.default_rng(10).standard_normal((40, 3))
    assert fit_gated_linear_map(folds_of(x, np.zeros((40, 2))), ridges=RIDGES) is None


def test_the_gate_opens_on_a_shift_alone():
    rng = np.random.default_rng(11)
    x, r = rng.standard_normal((400, 5)), 0.5 + 0.5 * rng.standard_normal((400, 5))
    fitted = fit_gated_linear_map(folds_of(x, r), ridges=[1e6, *RIDGES])
    assert fitted is not None
    np.testing.assert_allclose(fitted[0].bias, 0.5, atol=0.1)
    assert fitted[1] == 1e6  # there is nothing else to fit


@pytest.mark.parametrize(("n", "noise", "expected"), [(400, 1e-3, {0.0, 1e-4}), (40, 3.0, {1.0, 100.0})])
def test_the_gate_takes_the_ridge_that_the_noise_asks_for(n, noise, expected):
    rng = np.random.default_rng(12)
    x = rng.standard_normal((n, 20))
    r = 0.3 * x[:, :5] + noise * rng.standard_normal((n, 5)) + 1
    fitted = fit_gated_linear_map(folds_of(x, r), ridges=[100.0, 1.0, 1e-2, 1e-4, 0.0])
    assert fitted is not None
    linear_map, ridge = fitted
    assert ridge in expected
    again = fit_linear_map(moments_of(x, r), ridge=ridge)
    np.testing.assert_allclose(linear_map.weight, again.weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(linear_map.bias, again.bias, rtol=1e-9)


def test_the_gates_error_is_of_folds_left_out():
    """The ridge by hand: four fits of three folds each, their errors on the fourth summed over the pairs."""
    x, r = pairs(np.random.default_rng(13), 32, noise=4)
    errors = dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for out in np.split(np.arange(32), 4):
            kept = np.setdiff1d(np.arange(32), out)
            errors[ridge] += direct_error(x[out], r[out], fit_linear_map(moments_of(x[kept], r[kept]), ridge=ridge))
    fitted = fit_gated_linear_map(folds_of(x, r), ridges=RIDGES)
    assert fitted is not None
    assert fitted[1] == min(errors, key=lambda ridge: errors[ridge])


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.permutations(range(4)))
def test_the_order_of_folds_does_not_matter(seed, order):
    x, r = pairs(np.random.default_rng(seed), 60, noise=2)
    folds = folds_of(x, r)
    fitted = fit_gated_linear_map(folds, ridges=RIDGES)
    other = fit_gated_linear_map([folds[i] for i in order], ridges=RIDGES)
    assert fitted is not None
    assert other is not None
    assert fitted[1] == other[1]
    np.testing.assert_allclose(other[0].weight, fitted[0].weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(other[0].bias, fitted[0].bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("x", "r"), [((3, 2), (4, 2)), ((0, 2), (0, 2)), ((3,), (3,)), ((3, 2), (3,))])
def test_other_shapes_are_refused(x, r):
    with pytest.raises(OptionError, match=r"pairs have shapes .*; expected \(n, in\) and \(n, out\), n ≥ 1"):
        LinearMoments.of(torch.zeros(x), torch.zeros(r))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    x, r = torch.ones(5, 2), torch.ones(5, 3)
    x[1, 0], r[1, 1], r[4, 0] = bad, bad, np.inf
    with pytest.raises(ModelError, match="2 of 5 pairs hold numbers that are not finite"):
        LinearMoments.of(x, r)


def test_a_gate_needs_two_folds_and_a_ridge():
    moments = moments_of(*pairs(np.random.default_rng(14), 20))
    with pytest.raises(OptionError, match="folds: 1; a held-out gate needs at least 2"):
        fit_gated_linear_map([moments], ridges=[0.0])
    with pytest.raises(OptionError, match="ridges is empty; give at least one"):
        fit_gated_linear_map([moments, moments], ridges=[])


@pytest.mark.parametrize("ridge", [-1e-9, np.nan, np.inf])
def test_ridges_that_cannot_be_are_refused(ridge):
    with pytest.raises(OptionError, match=f"ridge={ridge}; expected a finite number, 0 or more"):
        fit_linear_map(moments_of(*pairs(np.random.default_rng(15), 20)), ridge=ridge)


def site(seed, n=4000, *, matrix=None):
    """A site's quantised outputs and float ones: channels of sizes 0.01 to 1,000, a tenth of each lost to noise."""
    rng = np.random.default_rng(seed)
    size = np.logspace(-2, 3, 8)
    y_q = rng.standard_normal((n, 8))
    y = y_q @ (np.diag(np.linspace(0.7, 1.3, 8)) if matrix is None else matrix) + 0.1 * rng.standard_normal((n, 8)) + 1
    return size * y_q, size * y


def snr_db(y, approximation):
    return 10 * np.log10(y.var(0).sum() / np.square(y - approximation).mean(0).sum())


def test_a_diagonal_site_is_found_nearly_diagonal():
    found = near_diagonal(moments_of(*site(0)), moments_of(*site(1)))
    assert found.off_diagonal_share < 1e-3
    assert found.off_diagonal_share_of_change < 0.02
    assert found.snr_db_diagonal == pytest.approx(found.snr_db_full, abs=0.05)
    assert found.snr_db_diagonal > found.snr_db_uncompensated + 5


def test_a_mixing_site_is_found_far_from_diagonal():
    """A quarter of the next channel comes with each: 1 in 17 of the energy is off the diagonal, all of the change."""
    matrix = np.eye(8) + 0.25 * np.roll(np.eye(8), 1, axis=1)
    found = near_diagonal(moments_of(*site(0, matrix=matrix)), moments_of(*site(1, matrix=matrix)))
    assert found.off_diagonal_share == pytest.approx(1 / 17, rel=0.03)
    assert found.off_diagonal_share_of_change > 0.99
    assert found.snr_db_full > found.snr_db_diagonal + 5


def test_its_signal_to_noise_is_that_of_held_out_pairs():
    (y_q, y), (later_q, later) = site(0, 60), site(1, 500)
    found = near_diagonal(moments_of(y_q, y), moments_of(later_q, later))
    affine = fit_affine(ChannelMoments.of(y_q, y))
    assert found.snr_db_uncompensated == pytest.approx(snr_db(later, later_q))
    assert found.snr_db_diagonal == pytest.approx(snr_db(later, affine.scale * later_q + affine.offset))
    plain = fit_linear_map(moments_of(y_q, y), ridge=0)
    assert found.snr_db_full == pytest.approx(snr_db(later, predicted(later_q, plain)), abs=0.01)


def test_it_draws_towards_the_identity():
    """Three pairs say nothing of most directions in eight channels; what they do not say stays as it was."""
    (y_q, _), (later_q, _) = site(0, 3), site(1)
    later = later_q + 5 + np.random.default_rng(2).standard_normal(later_q.shape)
    found = near_diagonal(moments_of(y_q, y_q + 5), moments_of(later_q, later))
    assert found.snr_db_full == pytest.approx(snr_db(later, later_q + 5))
    assert found.off_diagonal_share == pytest.approx(0, abs=1e-12)


def test_dead_channels_do_not_spoil_the_shares():
    y_q, y = site(0)
    later_q, later = site(1)
    for x, k in ((y_q, 2), (later_q, 2), (y, 2), (later, 2), (y_q, 5), (later_q, 5), (y, 6), (later, 6)):
        x[:, k] = 0.1
    found = near_diagonal(moments_of(y_q, y), moments_of(later_q, later))
    assert found.off_diagonal_share < 1e-3
    assert found.snr_db_full == pytest.approx(found.snr_db_diagonal, abs=0.1)


def test_a_perfect_site_and_a_silent_one():
    y_q, y = np.zeros((4, 3)), np.random.default_rng(16).standard_normal((4, 3))
    perfect = near_diagonal(moments_of(y, y), moments_of(y, y))
    assert perfect.snr_db_uncompensated == perfect.snr_db_diagonal == perfect.snr_db_full == inf
    silent = near_diagonal(moments_of(y_q, y_q), moments_of(y_q, y_q))
    assert silent.off_diagonal_share == silent.off_diagonal_share_of_change == 0
    assert silent.snr_db_full == -inf


def test_two_sites_are_refused():
    moments = moments_of(*pairs(np.random.default_rng(17), 20))
    with pytest.raises(OptionError, match="pairs have 5 and 3 channels"):
        near_diagonal(moments, moments)
