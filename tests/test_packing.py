"""Packed rows: what shares one, how long and how many they are, and who sees whom in them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_groups import V, assert_slots_see_their_own, make_group, make_prompt

from longrl_jax import packing
from longrl_jax.batching import make_batch
from longrl_jax.losses import MEANS
from longrl_jax.packing import Packed, common_shape, pack, row_tokens, segments_of
from longrl_jax.types import Batch

MAX_ROW_TOKENS = 64


def lay_out(groups, *, features=None, packed, num_shards=1, num_rows=0, **options):
    options = {"smallest_bucket": 4, "max_row_tokens": MAX_ROW_TOKENS} | options
    return make_batch(
        groups,
        features=features or [None] * len(groups),
        advantages=[np.ones(len(g.samples), np.float32) for g in groups],
        num_rows=num_rows or -(-len(groups) // packed.rows_per_pass) * packed.rows_per_pass,
        num_shards=num_shards,
        packed=packed,
        **options,
    )


def test_three_examples_in_a_row_of_sixteen_places():
    """Prefixes of 5, 3 and 1 tokens have room for 8: the longest is cut by one, which stands before
    its answer. Slots: 7 tokens, padded to 8."""
    groups = [
        make_group(make_prompt([10, 11, 12, 13, 14, 15]), [20, 21]),
        make_group(make_prompt([30, 31, 32, 33]), [40]),
        make_group(make_prompt([50, 51]), [60, 61, 62]),
    ]
    packed = Packed(rows_per_pass=1, num_sequences=3)
    batch, index = lay_out(groups, packed=packed, max_row_tokens=16, order="contiguous")
    drawn = {
        "tokens": "10 11 12 13 30 31 32 50 | 14 15 20 33 51 60 61  .",
        "order": "   0  1  2  3  0  1  2  0 |  4  5  6  3  1  2  3  .",
        "branch": "  0  0  0  0  0  0  0  0 |  1  1  1  1  1  1  1  .",
        "segment": " 1  1  1  1  2  2  2  3 |  1  1  1  2  3  3  3  .",
        "rope_pos": "0  1  2  3  0  1  2  0 |  4  5  6  3  1  2  3  .",
        "targets": "                            0 20 21 40 60 61 62  .",
        "loss_mask": "                          0  1  1  1  1  1  1  .",
        "sequence": "                           0  0  0  1  2  2  2  .",
    }
    for field, text in drawn.items():
        want = [0 if x == "." else int(x) for x in text.replace("|", " ").split()]
        np.testing.assert_array_equal(getattr(batch, field)[0], want, err_msg=field)
    assert index.rows == (0, 0, 0) and (index.num_tokens, index.num_places) == (15, 16)
    assert batch.num_sequences == 3


@st.composite
def steps(draw):
    """Groups about texts, and about films that some share; one answer each, or a few."""
    several = draw(st.booleans())
    groups, features = [], []
    stored = {key: np.random.default_rng(i).normal(size=(6, 3)) for i, key in enumerate("ab")}
    for _ in range(draw(st.integers(1, 12))):
        key = draw(st.sampled_from(["", "a", "b"]))
        words = draw(st.lists(st.integers(1, 80), min_size=1, max_size=14))
        film = [9, V, V, V, 8, V, V, V] if key else []
        tokens, dims = film + words, draw(st.sampled_from([(), (3,)]) if not groups else st.none())
        dims = groups[0].prompt.rope_pos.shape[1:] if groups else dims
        rope_pos = np.arange(len(tokens), dtype=np.int32)
        if dims:
            rope_pos = np.stack([rope_pos, rope_pos // 2, rope_pos // 3], axis=1)
        prompt = make_prompt(tokens, key=key, rope_pos=rope_pos, next_rope_pos=len(tokens) - 1)
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3 if several else 1))
        groups.append(make_group(prompt, *[np.arange(n) + 1 for n in lengths]))
        features.append(stored[key].astype(np.float32) if key else None)
    return groups, features


@settings(max_examples=60, deadline=None)
@given(
    step=steps(),
    num_shards=st.sampled_from([1, 2, 4]),
    order=st.sampled_from(["spread", "contiguous"]),
    rows_per_pass=st.integers(1, 3),
)
def test_no_example_sees_another(step, num_shards, order, rows_per_pass):
    groups, features = step
    packed = Packed(rows_per_pass=rows_per_pass, num_sequences=sum(len(g.samples) for g in groups))
    batch, index = lay_out(
        groups, features=features, packed=packed, num_shards=num_shards, order=order
    )
    ones = [np.ones(len(g.samples)) for g in groups]
    num_slots = assert_slots_see_their_own(batch, index, groups, features, ones)
    assert (
        num_slots == batch.loss_mask.sum() == sum(len(s.tokens) for g in groups for s in g.samples)
    )
    used = len(set(index.rows))
    assert used <= len(segments_of(groups, MAX_ROW_TOKENS))
    passes, rest = divmod(len(batch.tokens), rows_per_pass)
    assert not rest and (passes.bit_count() == 1 or passes == -(-len(groups) // rows_per_pass))
    needed = -(-used // rows_per_pass) * rows_per_pass
    assert index.num_places == needed * batch.tokens.shape[1]
    assert index.num_tokens == np.count_nonzero(batch.segment)
    again, _ = lay_out(groups, features=features, packed=packed, num_shards=num_shards, order=order)
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    if all(len(g.samples) == 1 for g in groups) and not any(g.prompt.media for g in groups):
        assert batch.tokens.shape[1] % (MAX_ROW_TOKENS // packing.QUARTERS) == 0
        assert batch.tokens.shape[1] <= MAX_ROW_TOKENS


def texts(lengths):
    """(tokens of the prompt, of the answer) -> groups without media."""
    return [make_group(make_prompt(np.full(p, 7)), np.full(a, 5)) for p, a in lengths]


def test_rows_are_few_even_and_whole_passes_come_together():
    """18 examples of 10 tokens in rows of 64: three rows; four, evenly, where two are a pass."""
    groups = texts([(6, 5)] * 18)
    assert row_tokens(groups[:1]) == 10
    segments = [[i] for i in range(18)]
    rows = pack(segments, groups, MAX_ROW_TOKENS)
    assert sorted(map(len, rows)) == [6, 6, 6]
    rows = pack(segments, groups, MAX_ROW_TOKENS, multiple=2)
    assert sorted(map(len, rows)) == [4, 4, 5, 5]
    # a long one, as dear for attention as many short ones, comes first
    groups = texts([(6, 5)] * 12 + [(50, 8)])
    rows = pack([[i] for i in range(13)], groups, MAX_ROW_TOKENS)
    assert rows[0] == [[12]] and sorted(map(len, rows)) == [1, 6, 6]


def test_one_that_fits_evenly_nowhere_is_placed_as_it_first_fits():
    """Even rows would put 30 upon 20 + 20; first fit fills 30 + 30, and 20 three times."""
    groups = texts([(p, 1) for p in (30, 30, 20, 20, 20)])
    rows = pack([[i] for i in range(5)], groups, 60)
    assert sorted(sorted(sum(row, [])) for row in rows) == [[0, 1], [2, 3, 4]]


def test_few_shapes_occur_in_fifty_steps():
    """Of short image questions and long films, 32 a step, in rows that are three quarters full."""
    rng = np.random.default_rng(0)
    packed = Packed(rows_per_pass=2, num_sequences=32)
    shapes, fill = set(), []
    for _ in range(50):
        long = rng.random(32) < 0.3
        prompt = np.where(long, rng.integers(300, 900, 32), rng.integers(40, 160, 32))
        answer = np.where(long, rng.integers(60, 250, 32), rng.integers(5, 40, 32))
        batch, index = lay_out(
            texts(list(zip(prompt, answer, strict=True))), packed=packed, num_rows=32,
            max_row_tokens=2048, smallest_bucket=64,
        )  # fmt: skip
        shapes.add((batch.tokens.shape, batch.targets.shape, batch.num_sequences))
        fill.append(index.num_tokens / index.num_places)
    assert len(shapes) <= 6 and np.mean(fill) > 0.75


def test_processes_that_pack_their_own_groups_have_rows_of_one_shape():
    """The first has many short examples, the second one long, the third none."""
    packed = Packed(rows_per_pass=1, num_sequences=9)
    parts = [texts([(9, 8)] * 9), texts([(40, 20)]), []]
    told = []

    def agree(shape):
        told.append(shape)
        return common_shape(told)

    def laid(part):
        return lay_out(part, packed=packed, num_rows=9, agree=agree)

    for _ in range(2):
        batches = [laid(part) for part in parts]
    assert len({jax.tree.structure(batch) for batch, _ in batches}) == 1
    (shape,) = {jax.tree.leaves(jax.tree.map(np.shape, batch))[1] for batch, _ in batches} or {None}
    assert [len(batch.tokens) for batch, _ in batches] == [4, 4, 4] and shape
    assert {batch.tokens.shape for batch, _ in batches} == {(4, MAX_ROW_TOKENS)}
    assert {index.num_places for _, index in batches} == {3 * MAX_ROW_TOKENS}
    for (batch, index), part in zip(batches, parts, strict=True):
        ones = [np.ones(1)] * len(part)
        assert_slots_see_their_own(batch, index, part, [None] * len(part), ones)


@pytest.mark.parametrize("name", MEANS)
def test_means_weigh_a_token_as_they_do_in_a_row_of_its_own(name):
    groups = [
        make_group(make_prompt([1, 2, 3]), [5] * n, [6] * m) for n, m in [(1, 4), (7, 2), (3, 3)]
    ]
    packed, index = lay_out(groups, packed=Packed(rows_per_pass=1, num_sequences=6))
    assert len(packed.tokens) == 1
    alone, alone_index = make_batch(
        groups, features=[None] * 3, advantages=[np.ones(2)] * 3, num_rows=3, num_shards=1,
        smallest_bucket=4, max_row_tokens=64,
    )  # fmt: skip

    def weights(batch: Batch, where):
        weight, divisor = MEANS[name](
            batch.loss_mask, batch.sequence, num_sequences=batch.num_sequences, max_tokens=9
        )
        return where.per_sample(np.asarray(weight)), float(divisor)

    (got, divisor), (want, wanted) = weights(packed, index), weights(alone, alone_index)
    assert divisor == wanted
    jax.tree.map(np.testing.assert_array_equal, got, want)
