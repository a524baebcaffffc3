"""The order of an epoch: a permutation that (seed, epoch) decides, cut the same way for any number of processes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldtap.adaptors.data import epoch_order
from coldtap.adaptors.data.epoch_order import (
    MIN_POOL_BLOCKS,
    POOL_SAMPLES,
    batch_bounds,
    block_mixing,
    block_starts,
    epoch_draw,
)
from coldtap.errors import OptionError


def full_blocks(n_blocks, block_rows):
    return block_starts(np.arange(n_blocks * block_rows), block_rows)


@st.composite
def rows_and_blocks(draw):
    """Rows of a split with some rejected, and their block size."""
    block_rows = draw(st.sampled_from([1, 2, 8, 64]))
    first = draw(st.integers(0, 3)) * block_rows
    present = draw(st.lists(st.booleans(), min_size=1, max_size=300).filter(any))
    return first + np.flatnonzero(present), block_rows


@given(rows_and_blocks())
def test_blocks_start_where_the_row_numbers_say(drawn):
    rows, block_rows = drawn
    starts = block_starts(rows, block_rows)
    _, sizes = np.unique(rows // block_rows, return_counts=True)
    assert np.diff(starts).tolist() == sizes.tolist()
    assert (starts[0], starts[-1]) == (0, len(rows))


@given(rows_and_blocks(), st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_an_epoch_is_a_permutation_with_a_view_of_each(drawn, seed, epoch, n_views, by_block):
    rows, block_rows = drawn
    blocks = block_starts(rows, block_rows) if by_block else None
    order, views = epoch_draw(len(rows), n_views, seed=seed, epoch=epoch, blocks=blocks)
    assert np.sort(order).tolist() == list(range(len(rows)))
    assert order.dtype == np.int64
    assert len(views) == len(rows)
    assert 0 <= views.min() <= views.max() < n_views
    again = epoch_draw(len(rows), n_views, seed=seed, epoch=epoch, blocks=blocks)
    np.testing.assert_array_equal(order, again[0])
    np.testing.assert_array_equal(views, again[1])


@pytest.mark.parametrize("blocks", [None, full_blocks(25, 4)])
def test_seeds_and_epochs_differ(blocks):
    drawn = {tuple(epoch_draw(100, 1, seed=s, epoch=e, blocks=blocks)[0]) for s in (0, 1) for e in (1, 2)}
    assert len(drawn) == 4


def test_an_unfinished_run_goes_on_in_the_order_of_earlier_versions():
    order, views = epoch_draw(8, 3, seed=0, epoch=1)
    assert (order.tolist(), views.tolist()) == ([1, 3, 7, 6, 0, 4, 2, 5], [2, 2, 0, 0, 0, 0, 2, 0])
    order, views = epoch_draw(8, 3, seed=0, epoch=1, blocks=full_blocks(4, 2))
    assert (order.tolist(), views.tolist()) == ([5, 7, 1, 0, 4, 3, 2, 6], [0, 2, 0, 0, 0, 2, 2, 1])


@pytest.mark.parametrize("blocks", [None, full_blocks(2, 2)])
def test_every_permutation_of_one_pool_is_equally_likely(blocks):
    draws = [tuple(epoch_draw(4, 1, seed=0, epoch=e, blocks=blocks)[0].tolist()) for e in range(4800)]
    counts = [draws.count(order) for order in sorted(set(draws))]
    # 24 permutations, 200 times each, standard deviation 14.
    assert len(counts) == 24
    assert 130 < min(counts) <= max(counts) < 270


@pytest.mark.parametrize("block_rows", [16, 512, 1000])
def test_a_pool_mixes_whole_blocks_and_no_others(block_rows):
    per_pool = max(MIN_POOL_BLOCKS, POOL_SAMPLES // block_rows)
    order, _ = epoch_draw(3 * per_pool * block_rows, 1, seed=0, epoch=1, blocks=full_blocks(3 * per_pool, block_rows))
    pools = np.split(order, 3)
    assert [len(np.unique(pool // block_rows)) for pool in pools] == [per_pool] * 3
    assert all((np.diff(pool) != 1).mean() > 0.9 for pool in pools), "the samples of a pool are in their old order"


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))
def test_processes_share_the_batches_of_one(n_samples, batch_size, world_size):
    whole = batch_bounds(n_samples, batch_size=batch_size * world_size)
    parts = [batch_bounds(n_samples, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    left_out = len(whole) - len(parts[0])
    # Only a last global batch that would leave a process without a sample is left out.
    assert left_out == (1 if 0 < n_samples % (batch_size * world_size) < world_size else 0)
    for step, bounds in enumerate(np.stack(parts, axis=1)):
        assert (bounds[0, 0], bounds[-1, 1]) == tuple(whole[step])
        assert bounds[1:, 0].tolist() == bounds[:-1, 1].tolist()
        sizes = np.diff(bounds)
        assert 1 <= sizes.min() <= sizes.max() <= min(sizes.min() + 1, batch_size)


def test_a_single_process_leaves_nothing_out():
    assert batch_bounds(10, batch_size=3).tolist() == [[0, 3], [3, 6], [6, 9], [9, 10]]


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank, world_size):
    with pytest.raises(
        OptionError, match=rf"rank={rank}: it must be 0 to {world_size - 1} for world_size={world_size}"
    ):
        batch_bounds(10, batch_size=3, rank=rank, world_size=world_size)


def together(blocks, batch_size, by_block, n_epochs=300):
    """How often two samples of one block were in one batch."""
    block_of = np.repeat(np.arange(len(blocks) - 1), np.diff(blocks))
    met = 0
    for epoch in range(n_epochs):
        order, _ = epoch_draw(len(block_of), 1, seed=3, epoch=epoch, blocks=blocks if by_block else None)
        batch = np.arange(len(order)) // batch_size
        _, counts = np.unique(np.stack([batch, block_of[order]]), axis=1, return_counts=True)
        met += int((counts * (counts - 1)).sum())
    return met


@pytest.mark.parametrize(("n_blocks", "batch_size"), [(64, 16), (61, 24), (20, 5)])
def test_the_statement_is_what_a_simulation_finds(monkeypatch, n_blocks, batch_size):
    monkeypatch.setattr(epoch_order, "POOL_SAMPLES", 64)
    blocks = full_blocks(n_blocks, 8)
    mixing = block_mixing(blocks, batch_size)
    found = together(blocks, batch_size, True) / together(blocks, batch_size, False)
    assert mixing.likelier == pytest.approx(found, rel=0.05)
    assert mixing.likelier > 2
    assert mixing.pool_samples == round(n_blocks * 8 / -(-n_blocks // 8))


def test_the_statement_in_words():
    assert str(block_mixing(full_blocks(1000, 512), 32)) == (
        "block shuffle: 4,096 of 512,000 samples (0.80%, 8 blocks) are mixed at a time; two samples of one block meet "
        "in a batch 125 times as often as under a uniform shuffle"
    )
    assert str(block_mixing(full_blocks(5, 512), 32)) == (
        "block shuffle: all 2,560 samples are mixed together, as by a uniform shuffle"
    )


@pytest.mark.parametrize(("n_samples", "batch_size"), [(1, 4), (100, 1)])
def test_where_no_two_samples_can_meet_nothing_is_likelier(n_samples, batch_size):
    assert block_mixing(block_starts(np.arange(n_samples), 1), batch_size).likelier == 1.0


@pytest.mark.parametrize("block_rows", [None, 1, 64])
def test_an_epoch_takes_a_few_numbers_a_sample(block_rows):
    n_samples = 500_000
    blocks = None if block_rows is None else full_blocks(n_samples // block_rows, block_rows)
    tracemalloc.start()
    epoch_draw(n_samples if blocks is None else int(blocks[-1]), 1, seed=0, epoch=1, blocks=blocks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * n_samples
