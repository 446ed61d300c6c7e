"""The order of tokens in a batch gives every device of a ring the same work."""

import numpy as np
import pytest
from tiny_groups import make_group, make_prompt

from longrl_jax.batching import make_batch
from longrl_jax.packing import Packed
from longrl_jax.sharding import executed_tiles, imbalance

BALANCED = 1.05  # a ring waits at most a twentieth of its time
ROWS = {  # (tokens of the prompt, tokens of each sample) of every group in the row
    "1:1": [(8192, [1024] * 8)],
    "10:1": [(12000, [150] * 8)],
    "100:1": [(16000, [20] * 8)],
    "very uneven samples": [(8000, [3, 2, 2500, 40, 5, 7, 33, 400])],
    "one long sample": [(4000, [1] * 7 + [6000])],
    "packed groups": [(6000, [250] * 4), (2500, [900, 20, 100, 4]), (9000, [25] * 8)],
    "many packed groups": [(1500, [50, 25, 35, 150])] * 8,
}


def ids_of(groups, num_shards, order="spread"):
    """The ids [1, T] of one row that make_batch lays out."""
    rollouts = [
        make_group(make_prompt(np.full(p, 7)), *[np.full(n, 7) for n in lengths])
        for p, lengths in groups
    ]
    batch, _ = make_batch(
        rollouts,
        features=[None] * len(groups),
        advantages=[np.ones(len(lengths), np.float32) for _, lengths in groups],
        num_rows=1,
        num_shards=num_shards,
        smallest_bucket=128,
        max_row_tokens=10**5,
        groups_per_row=len(groups),
        order=order,
    )
    return batch.order, batch.branch, batch.segment


@pytest.mark.parametrize("num_shards", [4, 8])
@pytest.mark.parametrize("row", ROWS)
def test_no_device_waits_for_another(row, num_shards):
    """In blocks of each kernel's size, and with heads shared by neighbours."""
    ids = ids_of(ROWS[row], num_shards)
    for block_size in (512, 64):
        for ulysses in (1, 2):
            tiles = executed_tiles(
                *ids, num_devices=num_shards, block_size=block_size, ulysses=ulysses
            )
            assert tiles.shape == (num_shards // ulysses, num_shards)
            assert imbalance(tiles) <= BALANCED, (block_size, ulysses)


@pytest.mark.parametrize("num_shards", [4, 8])
def test_no_device_waits_for_another_in_a_packed_row(num_shards):
    """Two films with their reasoning, a shorter one and forty pictures, in 32,768 places: prompts
    are cut, and every device has its part of each example."""
    lengths = [(12000, 700), (9000, 900), (3400, 300)] + [(120, 20)] * 40
    rollouts = [make_group(make_prompt(np.full(p, 7)), np.full(a, 7)) for p, a in lengths]
    batch, index = make_batch(
        rollouts,
        features=[None] * len(rollouts),
        advantages=[np.ones(1, np.float32)] * len(rollouts),
        num_rows=len(rollouts),
        num_shards=num_shards,
        smallest_bucket=1024,
        max_row_tokens=32768,
        packed=Packed(rows_per_pass=1, num_sequences=len(rollouts)),
    )
    assert set(index.rows) == {0} and batch.tokens.shape == (1, 32768)
    assert batch.targets.shape == (1, 4096)  # so there is no room for all 29,157 of the prompts
    whole = sum((p + a) ** 2 / 2 for p, a in lengths)  # pairs that attention must look at
    for block_size in (512, 64):
        for ulysses in (1, 2):
            tiles = executed_tiles(
                batch.order, batch.branch, batch.segment,
                num_devices=num_shards, block_size=block_size, ulysses=ulysses,
            )  # fmt: skip
            assert imbalance(tiles) <= BALANCED, (block_size, ulysses)
            if block_size == 64:  # no more than others' keys at the borders of tiles
                assert tiles.sum() / ulysses * block_size**2 < 1.6 * whole


def test_a_contiguous_order_would_wait():
    """Otherwise the measure could not fail."""
    ids = ids_of(ROWS["10:1"], 8, order="contiguous")
    assert imbalance(executed_tiles(*ids, num_devices=8, block_size=64)) > 1.5


def test_spread_costs_no_more_than_zigzag():
    """In tiles of the slowest: balance alone would praise an order that gives everyone more."""
    for row in ("1:1", "10:1", "very uneven samples", "packed groups"):
        spread, zigzag = (
            executed_tiles(*ids_of(ROWS[row], 8, order), num_devices=8, block_size=64)
            for order in ("spread", "zigzag")
        )
        assert spread.max(axis=1).sum() <= BALANCED * zigzag.max(axis=1).sum(), row


def test_tiles_against_a_drawing():
    """Four devices of two blocks; a causal row in order. Steps look back round the ring."""
    order = np.arange(64)[None]
    ids = order, np.zeros_like(order), np.ones_like(order)
    np.testing.assert_array_equal(
        executed_tiles(*ids, num_devices=4, block_size=8),
        [[3, 3, 3, 3], [0, 4, 4, 4], [0, 0, 4, 4], [0, 0, 0, 4]],
    )
    np.testing.assert_array_equal(
        executed_tiles(*ids, num_devices=4, block_size=8, ulysses=2),
        [[10, 10, 10, 10], [0, 0, 16, 16]],
    )


def test_padding_costs_no_tile_and_a_row_that_needs_one_is_enough():
    order = np.tile(np.arange(32), (2, 1))
    segment = np.ones_like(order)
    segment[:, 24:] = 0
    ids = order, np.zeros_like(order), segment
    assert executed_tiles(*ids, num_devices=1, block_size=8) == 6
    segment[0, 8:] = 0  # the other row still needs them
    assert executed_tiles(*ids, num_devices=1, block_size=8) == 6
    assert executed_tiles(*(x[:1] for x in ids), num_devices=1, block_size=8) == 1


def test_imbalance_is_what_the_slowest_costs():
    assert imbalance(np.array([[4, 2], [1, 3]])) == (4 + 3) / 5
