"""int8 codes: the bound of every single value, the robust scale, and the two encoders that must agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coldtap.errors import OptionError, StoreError
from coldtap.pipeline.extract.encode import BlockEncoder
from coldtap.pipeline.extract.gather import Gathered
from coldtap.stores.format.arrays import ArraySpec
from coldtap.stores.format.codes import (
    MAX_CODE,
    ErrorBound,
    bound_of,
    choose_scaling,
    encode,
    measure_errors,
    restore_codes,
    robust_moments,
)
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.tiers import Numbers
from coldtap.stores.writing.block import ArrayBuffer
from coldtap.stores.writing.calibration import CalibrationSamples

BOUND = ErrorBound(snr_db=30)


def restored(values, scaling):
    """What a reader gets back."""
    encoded = encode(values, scaling)
    out = np.empty(values.shape, np.float32)
    restore_codes(encoded.codes, out, scaling)
    out[tuple(encoded.escapes.position.T)] = encoded.escapes.value
    return out


def require_bound(values, scaling):
    error = np.abs(values.astype(np.float64) - restored(values, scaling))
    assert (error <= bound_of(scaling)[:, None]).all()


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def samples_of(values):
    """(row, tap, token, channel) as (tap, value, channel)."""
    return values.transpose(1, 0, 2, 3).reshape(values.shape[1], -1, values.shape[-1])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.floats(-12, 12),
    st.floats(-18, 18),
    st.sampled_from([3.0, 10.0, 30.0, 40.0]),
    st.floats(0, 6),
)
def test_every_value_is_within_half_a_step(seed, log_scale, log_offset, snr, log_massive):
    """Whatever the scale, the offset beside it and the massive values: the bound holds for each value."""
    rng = np.random.default_rng(seed)
    base = (
        rng.standard_normal((16, 2, 5, 7)) * 10**log_scale + np.sign(rng.standard_normal(7)) * 10**log_offset
    ).astype(np.float32)
    scaling = choose_scaling(samples_of(base), ErrorBound(snr_db=snr))
    require_bound(base, scaling)
    later = base + (rng.standard_cauchy(base.shape) * 10 ** (log_scale + log_massive)).astype(np.float32)
    require_bound(np.where(np.isfinite(later), later, 0).astype(np.float32), scaling)


def test_the_snr_is_reached_in_every_channel():
    values = normal((400, 1, 16, 24)) * np.logspace(-3, 3, 24, dtype=np.float32)
    scaling = choose_scaling(samples_of(values[:200]), BOUND)
    (about,) = measure_errors(values[200:], scaling, prefix_tokens=1)
    assert 30 < about["patch"]["worst_snr_db"] < 31.5
    assert about["prefix"]["worst_snr_db"] > 29
    assert 0.45 < about["largest_error_of_step"] <= 0.5
    assert about["escaped"] == 0


def test_one_massive_channel_does_not_pay_for_the_others():
    values = normal((200, 1, 16, 8))
    values[..., 3] *= 1000
    scaling = choose_scaling(samples_of(values), BOUND)
    error = (restored(values, scaling) - values).reshape(-1, 8)
    snr = 10 * np.log10(values.reshape(-1, 8).var(axis=0) / np.square(error).mean(axis=0))
    assert snr.min() > 30


@pytest.mark.parametrize("tokens", [[7], [0, 7, 8, 30, 49]])
def test_massive_tokens_do_not_widen_the_steps(tokens):
    values = normal((100, 1, 50, 4))
    usual = choose_scaling(samples_of(values), BOUND).scale
    values[:, 0, tokens, 2] += 1000  # always the same, up to a tenth of them
    scaling = choose_scaling(samples_of(values), BOUND)
    np.testing.assert_allclose(scaling.scale, usual, rtol=0.02)
    require_bound(values, scaling)
    assert len(encode(values, scaling).escapes.value) == 100 * len(tokens)


def test_relu_channels_keep_their_variance():
    values = np.maximum(normal((200, 1, 40, 3)) - np.array([0, 0.5, 2.5], np.float32), 0)
    _, variance = robust_moments(samples_of(values)[0])
    np.testing.assert_allclose(variance, values.reshape(-1, 3).var(axis=0), rtol=0.1)
    require_bound(values, choose_scaling(samples_of(values), BOUND))


def test_dead_channels_take_the_usual_step():
    values = normal((50, 1, 10, 5))
    values[..., 1], values[..., 2] = 0, 7
    scaling = choose_scaling(samples_of(values), BOUND)
    assert scaling.scale[0, 1] == scaling.scale[0, 2] == np.median(scaling.scale[0, [0, 3, 4]])
    np.testing.assert_array_equal(restored(values, scaling)[..., 1:3], values[..., 1:3])
    alive = values + normal(values.shape, 1)
    require_bound(alive, scaling)
    nothing = np.zeros((4, 2, 3, 5), np.float32)
    require_bound(nothing + 3, choose_scaling(samples_of(nothing), BOUND))


def test_the_largest_error_is_a_bound_too():
    values = normal((300, 1, 8, 6)) * np.logspace(-2, 2, 6, dtype=np.float32)
    scaling = choose_scaling(samples_of(values), ErrorBound(max_error=0.05))
    error = np.abs(restored(values, scaling) - values.astype(np.float64)).reshape(-1, 6).max(axis=0)
    deviation = values.reshape(-1, 6).std(axis=0)
    assert (error <= 0.0501 * deviation).all()
    assert (error > 0.04 * deviation).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give `snr` or `max_error`, one of the two"),
        ({"snr_db": 30, "max_error": 0.1}, "give `snr` or `max_error`, one of the two"),
        ({"snr_db": 60}, r"`snr=60` needs steps of .* at most `snr=40\.0` or at least `max_error=0\.016`"),
        ({"max_error": 0.001}, r"`max_error=0\.001` needs steps"),
        ({"snr_db": -9}, r"`snr=-9` allows steps of .* which keep nothing"),
        ({"max_error": 3}, r"`max_error=3` allows steps"),
        ({"snr_db": float("nan")}, "`snr=nan`: give a finite number"),
        ({"max_error": float("inf")}, "`max_error=inf`: give a finite number"),
        ({"snr_db": "thirty"}, "`snr='thirty'`: give a number"),
        ({"snr_db": -1e4}, "`snr=-10000` allows steps"),
        ({"snr_db": 1e6}, r"`snr=1e\+06` needs steps"),
        ({"max_error": 0.0}, "`max_error=0` needs steps"),
    ],
)
def test_bounds_that_int8_cannot_keep_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        ErrorBound(**given)


def test_the_device_makes_the_same_codes_bit_for_bit():
    """torch in the pipeline, numpy in `convert`: codes and escapes are equal."""
    geometry = Geometry(grid=(2, 4), prefix_tokens=1, channels=6)
    spec = ArraySpec(gather="layers", geometry=geometry, taps=(0, 4, 9), tier="int8", layout="fast", block_rows=8)
    values = normal((8, 3, 9, 6), 3) * np.logspace(-2, 2, 6, dtype=np.float32)
    values[3, 1, 2, 4] += 1e6
    values[5, 2, :, 0] *= 1e4
    values[:, 2, 1, 3] *= 1e7
    chosen = choose_scaling(samples_of(normal((50, 3, 9, 6)) * np.logspace(-2, 2, 6, dtype=np.float32)), BOUND)
    numbers = Numbers(exponents=(0, 0, 0), scaling=chosen)
    ours, reference = ArrayBuffer(spec, numbers), ArrayBuffer(spec, numbers)
    encoder = BlockEncoder({spec.name: ours}, torch.device("cpu"))
    for rows in ([0, 1, 2], [3, 4, 5, 6, 7]):
        reference.put(values[rows], rows)
        for place, tap in enumerate(spec.taps):
            part = Gathered(spec=spec, tap=tap, position=place, values=torch.from_numpy(values[rows, place]))
            encoder.write(part, rows, {})
    np.testing.assert_array_equal(ours.shard.values, reference.shard.values)
    present = np.ones(8, bool)
    mine, theirs = ours.take_escapes(2, present), reference.take_escapes(2, present)
    assert len(mine.value) > 3
    np.testing.assert_array_equal(mine.position, theirs.position)
    np.testing.assert_array_equal(mine.value, theirs.value)
    assert np.abs(ours.shard.values).max() == MAX_CODE


def test_one_bound_is_one_recipe_however_it_is_written():
    recipes = [ErrorBound(snr_db=given).to_dict() for given in (30, 30.0, np.float32(30), "30")]
    assert recipes == recipes[:1] * 4
    assert all(type(recipe["snr_db"]) is float for recipe in recipes)


def test_an_image_with_nan_does_not_hide_the_escapes_of_its_neighbours():
    geometry = Geometry(grid=(2, 4), prefix_tokens=1, channels=6)
    spec = ArraySpec(gather="layers", geometry=geometry, taps=(0,), tier="int8", layout="fast", block_rows=32)
    values = normal((4, 1, 9, 6))
    scaling = choose_scaling(samples_of(values), BOUND)
    values[1, 0, 3, 2] = 1000
    values[2, 0, 0, 0] = np.nan
    buffer = ArrayBuffer(spec, Numbers(exponents=(0,), scaling=scaling))
    flaws = {}
    part = Gathered(spec=spec, tap=0, position=0, values=torch.from_numpy(values[:, 0]))
    BlockEncoder({spec.name: buffer}, torch.device("cpu")).write(part, range(4), flaws)
    assert list(flaws) == [2]
    present = np.zeros(32, bool)
    present[[0, 1, 3]] = True
    found = buffer.take_escapes(0, present)
    np.testing.assert_array_equal(found.position, [[1, 0, 3, 2]])
    np.testing.assert_array_equal(found.value, [1000])
    np.testing.assert_array_equal(buffer.shard.values[[0, 1, 3]], encode(values[[0, 1, 3]], scaling).codes)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(encode(values, scaling).escapes.position, [[1, 0, 3, 2]])


def test_a_block_full_of_escapes_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr("coldtap.stores.writing.block.LARGEST_NUMBER", 20)
    geometry = Geometry(grid=(2, 4), prefix_tokens=1, channels=6)
    spec = ArraySpec(gather="layers", geometry=geometry, taps=(0, 5), tier="int8", layout="fast", block_rows=16)
    values = normal((16, 2, 9, 6))
    buffer = ArrayBuffer(spec, Numbers(exponents=(0, 0), scaling=choose_scaling(samples_of(values), BOUND)))
    buffer.put(values[:4], range(4))
    values[:, 1, :, 4] += 1e5
    with pytest.raises(StoreError, match=r"more than 3% of a block's values .* channel 4 at tap 5: the first rows"):
        buffer.put(values[4:], range(4, 16))


@pytest.mark.parametrize(("shift", "rtol", "atol_db"), [(0, 0.08, 0.7), (3, 0.08, 0.7), (20, 0.3, 3)])
def test_a_draw_of_tokens_gives_the_scales_of_all_of_them(monkeypatch, shift, rtol, atol_db):
    """Prefix tokens are all sampled; they must not weigh more in the scales than they do in the features.

    Five of 20 instead of five of 201 would make the steps three times as wide at a shift of 20.
    """
    geometry = Geometry(grid=(14, 14), prefix_tokens=5, channels=4)
    spec = ArraySpec(gather="layers", geometry=geometry, taps=(0, 1), tier="int8", layout="fast", block_rows=64)
    values = normal((192, 2, 201, 4))
    values[:, :, :5] += shift
    whole = choose_scaling(samples_of(values[:128]), BOUND)
    monkeypatch.setattr("coldtap.stores.writing.calibration.MAX_SAMPLE_BYTES", 192 * 4 * 2 * 4 * 20)
    samples = CalibrationSamples([spec], BOUND, 192)
    for row in range(192):
        tokens = samples.tokens(spec, row)
        assert len(tokens) == 20
        for place in (0, 1):
            samples.add(spec.name, place, 1.0, values[row, place, tokens])
    np.testing.assert_allclose(samples.numbers()[spec.name].scaling.scale, whole.scale, rtol=rtol)
    recorded = [about["patch"]["median_snr_db"] for about in samples.errors()[spec.name]]
    real = [about["patch"]["median_snr_db"] for about in measure_errors(values[128:], whole, prefix_tokens=5)]
    np.testing.assert_allclose(recorded, real, atol=atol_db)
