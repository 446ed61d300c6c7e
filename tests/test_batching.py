"""Rows of a batch against drawings made by hand, and against what a slot must see."""

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_groups import V, assert_slots_see_their_own, make_group, make_prompt

from longrl_jax import batching
from longrl_jax.batching import ORDERS, make_batch, place, split_passes
from longrl_jax.packing import bucket, common_shape, row_tokens, segments_of
from longrl_jax.sharding import make_mesh
from longrl_jax.types import Rollout, Sample


def lay_out(groups, *, features=None, advantages=None, num_rows=1, num_shards=1, **options):
    options = {"smallest_bucket": 4, "max_row_tokens": 100, "order": "contiguous"} | options
    return make_batch(
        groups,
        features=features or [None] * len(groups),
        advantages=advantages or [np.ones(len(g.samples), np.float32) for g in groups],
        num_rows=num_rows,
        num_shards=num_shards,
        **options,
    )


def numbers(text):
    """ "10 11 . ." -> [10, 11, 0, 0]; bars are for the eye."""
    return [0 if x == "." else int(x) for x in text.replace("|", " ").split()]


def assert_row(batch, row=0, **drawn):
    for field, text in drawn.items():
        got = np.asarray(getattr(batch, field)[row])
        np.testing.assert_array_equal(got, numbers(text), err_msg=field)


SMALL = make_group(make_prompt([10, 11, 12]), [20, 21, 22], [30])


def test_processes_lay_out_the_rows_of_their_groups_as_one_would_lay_out_all():
    other = make_group(make_prompt([1, V, V, 2, 3, 4], key="film"), [5, 6], [7, 8, 9, 7, 8])
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole, _ = lay_out([SMALL, other], features=[None, features], num_rows=3)
    told = []  # each process tells its shape, and is told what fits all

    def agree(shape):
        told.append(shape)
        return common_shape(told)

    for _ in range(2):
        parts = [
            lay_out([SMALL], agree=agree)[0],
            lay_out([other], features=[features], agree=agree)[0],
            lay_out([], advantages=[], agree=agree)[0],  # all of its videos were refused
        ]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_a_group_is_one_row():
    batch, _ = lay_out([SMALL], advantages=[np.array([2.0, -1.0], np.float32)])
    assert_row(
        batch,
        tokens="  10 11 . . | 12 20 21 12",
        order="    0  1 . . |  2  3  4  2",
        branch="   0  0 . . |  1  1  1  2",
        segment="  1  1 . . |  1  1  1  1",
        rope_pos=" 0  1 . . |  2  3  4  2",
        is_media=" 0  0 . . |  0  0  0  0",
        targets="              20 21 22 30",
        loss_mask="             1  1  1  1",
        advantage="             2  2  2 -1",
    )
    logps = np.array([[-0.20, -0.21, -0.22, -0.30]], np.float32)
    np.testing.assert_array_equal(batch.engine_logps, logps)
    assert batch.features is None


@pytest.mark.parametrize(
    ("order", "drawn"),
    {
        "contiguous": {
            "tokens": "   10 11 12 20 |  .  . 21 12",
            "branch": "    0  0  1  1 |  .  .  1  2",
            "segment": "   1  1  1  1 |  .  .  1  1",
            "targets": "        20 21 |       22 30",
        },
        "zigzag": {
            "tokens": "   10  . 12 12 | 11  . 20 21",
            "branch": "    0  .  1  2 |  0  .  1  1",
            "segment": "   1  .  1  1 |  1  .  1  1",
            "targets": "        20 30 |       21 22",
        },
        "spread": {
            "tokens": "   10  . 12 21 | 11  . 20 12",
            "branch": "    0  .  1  1 |  0  .  1  2",
            "segment": "   1  .  1  1 |  1  .  1  1",
            "targets": "        20 22 |       21 30",
        },
    }.items(),
)
def test_orders_over_two_shards(order, drawn):
    batch, index = lay_out([SMALL], num_shards=2, order=order)
    assert_row(batch, **drawn)
    first, second = index.per_sample(batch.targets)[0]
    assert first.tolist() == [20, 21, 22] and second.tolist() == [30]


def two_questions():
    """On one video; the engine says 4 media tokens, so sharing them saves more than it costs."""
    return [
        make_group(make_prompt([1, V, V, V, V, 5, 7], key="a"), [20, 21], [22]),
        make_group(make_prompt([1, V, V, V, V, 6, 8, 9], key="a"), [30], [31, 32]),
    ]


def test_two_questions_on_one_video_share_one_prefix():
    stored = np.arange(8, dtype=np.float32).reshape(4, 2) + 1
    batch, index = lay_out(two_questions(), features=[stored, stored])
    assert_row(
        batch,
        tokens="  1 90 90 90 90 . . . | 5 7 20  5 7  6 8 9  6  8  9 31",
        order="   0  1  2  3  4 . . . | 5 6  7  5 6  5 6 7  5  6  7  8",
        branch="  0  0  0  0  0 . . . | 1 1  1  2 2  3 3 3  4  4  4  4",
        segment=" 1  1  1  1  1 . . . | 1 1  1  1 1  1 1 1  1  1  1  1",
        is_media="0  1  1  1  1 . . . | 0 0  0  0 0  0 0 0  0  0  0  0",
        targets="                       0 20 21 0 22 0 0 30 0  0 31 32",
        loss_mask="                     0 1  1  0 1  0 0 1  0  0  1  1",
    )
    np.testing.assert_array_equal(batch.features[0, 1:5], stored)
    assert not batch.features[0, [0, *range(5, 20)]].any()
    got = index.per_sample(batch.targets)
    assert [[s.tolist() for s in group] for group in got] == [[[20, 21], [22]], [[30], [31, 32]]]


def test_media_in_a_tail_have_copies_of_their_features():
    """The questions stand before the video, so the shared prefix ends before it."""
    groups = [
        make_group(make_prompt([1, 2, V, V, 5], key="a"), [20]),
        make_group(make_prompt([1, 3, V, V, 5], key="a"), [30]),
    ]
    stored = np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16)
    batch, _ = lay_out(groups, features=[stored, stored])
    assert_row(
        batch,
        tokens="  1 . . . | 2 90 90 5  3 90 90 5",
        order="   0 . . . | 1  2  3 4  1  2  3 4",
        branch="  0 . . . | 1  1  1 1  2  2  2 2",
        is_media="0 . . . | 0  1  1 0  0  1  1 0",
        targets="           0  0  0 20 0  0  0 30",
    )
    assert batch.features.dtype == ml_dtypes.bfloat16
    column = batch.features[0, :, 0].astype(int)
    np.testing.assert_array_equal(column, numbers("0 . . . | 0 1 3 0  0 1 3 0"))


def test_other_media_are_never_shared():
    first, second = two_questions()
    other = make_group(
        make_prompt(second.prompt.tokens, key="b"), *([s.tokens for s in second.samples])
    )
    stored = np.ones((4, 2), np.float32)
    batch, index = lay_out([first, other], features=[stored, 2 * stored], num_rows=2)
    assert index.rows == (0, 1)
    np.testing.assert_array_equal(batch.features[:, 1:5, 0], [[1] * 4, [2] * 4])


def test_a_prefix_is_not_shared_where_that_costs_tokens():
    """Ten samples a question: ten copies of a long tail cost more than one long prefix saves."""
    tail = list(range(40, 60))
    groups = [
        make_group(make_prompt([1, V, V, first, *tail], key="a"), *[[20]] * 10) for first in (5, 6)
    ]
    stored = np.ones((2, 2), np.float32)
    _, index = lay_out(groups, features=[stored] * 2, num_rows=2, max_row_tokens=1000)
    assert index.rows == (0, 1)


def test_groups_of_one_row_are_segments_and_the_longest_come_first():
    groups = [
        make_group(make_prompt([1, 2]), [20]),  # 2 tokens of a row
        make_group(make_prompt([3, 4, 5]), [30, 31]),  # 4
        make_group(make_prompt([6]), [40]),  # 1
    ]
    assert [row_tokens([g]) for g in groups] == [2, 4, 1]
    batch, index = lay_out(groups, groups_per_row=2, num_rows=3, max_row_tokens=6)
    assert index.rows == (0, 0, 1)
    assert_row(
        batch,
        tokens="  3 4 1 . | 5 30  2 .",
        order="   0 1 0 . | 2  3  1 .",
        branch="  0 0 0 . | 1  1  1 .",
        segment=" 1 1 2 . | 1  1  2 .",
        targets="          30 31 20 .",
        loss_mask="         1 1  1 .",
    )
    assert_row(
        batch, 1, tokens=". . . . | 6 . . .", segment=". . . . | 1 . . .", targets="40 . . ."
    )
    for field in batching.TOKEN_FIELDS + batching.SLOT_FIELDS:
        assert not np.any(getattr(batch, field)[2]), field  # a row of padding


def test_rotation_positions_with_three_numbers():
    rope_pos = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 2], [3, 3, 3]], np.int32)
    prompt = make_prompt([1, V, V, 5], key="a", rope_pos=rope_pos, next_rope_pos=4)
    batch, _ = lay_out([make_group(prompt, [20, 21], [22])], features=[np.ones((2, 2), np.float32)])
    want = [[0, 0, 0], [1, 1, 1], [1, 1, 2], [0, 0, 0], [3, 3, 3], [4, 4, 4], [3, 3, 3], [0, 0, 0]]
    np.testing.assert_array_equal(batch.rope_pos[0], want)
    assert_row(batch, order="0 1 2 . | 3 4 3 .")


def test_where_the_first_answer_token_rotates():
    """M-RoPE and time pooling go on elsewhere than at the number of prompt tokens."""
    group = make_group(make_prompt([10, 11], next_rope_pos=7), [20, 21, 22])
    batch, _ = lay_out([group])
    assert_row(batch, rope_pos="0 . . . | 1 7 8 .", order="0 . . . | 1 2 3 .")


def random_groups(rng, num_groups):
    """Text prompts, and prompts on two videos, with 1 to 4 samples of 1 to 6 tokens."""
    groups, features = [], []
    stored = {key: rng.normal(size=(6, 3)).astype(np.float32) for key in "ab"}
    for _ in range(num_groups):
        key = rng.choice(["", "a", "b"])
        question = rng.integers(1, 80, rng.integers(1, 5)).tolist()
        prompt = make_prompt(([9, V, V, V, 8, V, V, V] if key else []) + question, key=key)
        lengths = rng.integers(1, 7, rng.integers(1, 5))
        groups.append(make_group(prompt, *[rng.integers(1, 80, n) for n in lengths]))
        features.append(stored[key] if key else None)
    return groups, features


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_slot_sees_its_own_sequence(order, num_shards):
    """By the rule of visibility, written as a loop: prompt and sample so far, nothing else."""
    rng = np.random.default_rng(num_shards)
    groups, features = random_groups(rng, 7)
    advantages = [rng.normal(size=len(g.samples)).astype(np.float32) for g in groups]
    batch, index = lay_out(
        groups, features=features, advantages=advantages, num_rows=8, num_shards=num_shards,
        order=order, groups_per_row=2, smallest_bucket=8,
    )  # fmt: skip
    num_slots = assert_slots_see_their_own(batch, index, groups, features, advantages)
    assert (
        batch.loss_mask.sum() == num_slots == sum(len(s.tokens) for g in groups for s in g.samples)
    )
    assert np.count_nonzero(batch.segment) == sum(
        row_tokens([groups[i] for i in same]) for same in segments_of(groups, max_row_tokens=100)
    )


def test_every_token_may_have_an_advantage_before_or_after_it_is_placed():
    """On 8 devices, in passes; and what a process reads back of its rows is what it gave."""
    rng = np.random.default_rng(0)
    groups, features = random_groups(rng, 7)
    worth = [[rng.normal(size=len(s.tokens)) for s in g.samples] for g in groups]
    options = {"num_rows": 8, "num_shards": 2, "smallest_bucket": 8, "order": "spread"}
    want, _ = lay_out(groups, features=features, advantages=worth, **options)
    batch, index = lay_out(groups, features=features, **options)
    placed = place(split_passes(batch, 4), make_mesh(fsdp=4, seq=2))
    placed = batching.with_advantages(placed, index, worth)
    got = batching.local_rows(placed.advantage)
    np.testing.assert_array_equal(got, np.asarray(placed.advantage))
    np.testing.assert_array_equal(got.reshape(want.advantage.shape), want.advantage)
    found = index.per_sample(got)
    for samples, wanted in zip(found, worth, strict=True):
        for x, y in zip(samples, wanted, strict=True):
            np.testing.assert_array_equal(x, y.astype(np.float32))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "num_shards"), [(2, 1), (6, 1), (4, 2), (6, 4), (2, 8)])
def test_orders_are_permutations(order, size, num_shards):
    places = ORDERS[order](np.arange(size * num_shards), size, num_shards)
    np.testing.assert_array_equal(np.sort(places), np.arange(size * num_shards))


def test_zigzag_gives_each_shard_an_early_and_a_late_chunk():
    places = ORDERS["zigzag"](np.arange(8), 4, 2)
    row = np.empty(8, int)
    row[places] = np.arange(8)
    np.testing.assert_array_equal(row, [0, 1, 6, 7, 2, 3, 4, 5])


def test_buckets_are_few():
    sizes = sorted({bucket(n, 128) for n in range(4097)})
    assert [size // 128 for size in sizes] == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(n <= bucket(n, 128) for n in range(4097))
    assert all(bucket(n, 128) <= 1.25 * n for n in range(1024, 4097))


def test_rows_of_near_lengths_have_one_shape():
    shapes = set()
    for length in range(9, 17):
        batch, _ = lay_out([make_group(make_prompt(range(1, length + 1)), [20])], smallest_bucket=8)
        shapes.add(batch.tokens.shape)
    assert shapes == {(1, 8 + 8), (1, 16 + 8)}  # 9 tokens have a prefix of 8


def test_per_sample_reads_passes_too():
    groups, features = random_groups(np.random.default_rng(5), 4)
    batch, index = lay_out(groups, features=features, num_rows=4, smallest_bucket=8)
    passes = split_passes(batch, 2)
    assert passes.targets.shape == (2, 2, batch.targets.shape[1])
    assert passes.features.shape == (2, 2, *batch.features.shape[1:])
    for group, got in zip(groups, index.per_sample(passes.targets), strict=True):
        for sample, tokens in zip(group.samples, got, strict=True):
            np.testing.assert_array_equal(tokens, sample.tokens)
    assert split_passes(batch, 0).tokens.shape == (1, *batch.tokens.shape)


def test_a_batch_is_placed_on_the_mesh():
    assert jax.device_count() == 8
    mesh = make_mesh(data=2, fsdp=2, seq=2)
    groups, features = random_groups(np.random.default_rng(6), 6)
    batch, _ = lay_out(groups, features=features, num_rows=8, num_shards=2, smallest_bucket=8)
    passes = split_passes(batch, 4)
    placed = place(passes, mesh)
    assert placed.num_shards == 2
    for field in ("tokens", "features", "loss_mask", "advantage"):
        got, want = getattr(placed, field), getattr(passes, field)
        np.testing.assert_array_equal(got, want)
        assert len(got.addressable_shards) == 8
        half = want.shape[2] // 2
        assert {s.data.shape for s in got.addressable_shards} == {(2, 1, half, *want.shape[3:])}
    t = passes.tokens.shape[2] // 2
    shard = next(s for s in placed.tokens.addressable_shards if s.index[2].start == t)
    np.testing.assert_array_equal(shard.data, passes.tokens[:, shard.index[1], t:])
    assert place(lay_out([SMALL], num_rows=4, num_shards=2)[0], mesh).features is None


VIDEO = make_prompt([1, V, V, 5], key="a", name="the clip")


@pytest.mark.parametrize(
    ("groups", "options", "named"),
    [
        ([], {}, "no rollouts"),
        ([SMALL], {"max_row_tokens": 5}, r"'q' takes 6 tokens .* batch.max_row_tokens=5"),
        ([SMALL] * 2, {}, "2 groups need 2 rows, but num_rows=1"),
        ([SMALL], {"order": "random"}, "choose one of contiguous, spread, zigzag"),
        ([make_group(VIDEO, [3])], {}, "'the clip': 2 media tokens, but 0 features"),
        ([make_group(VIDEO, [3])], {"features": [np.ones((3, 2))]}, "2 media tokens, but 3 feat"),
        ([make_group(make_prompt([1, V]), [3])], {"features": [np.ones((1, 2))]}, "ends in media"),
        ([SMALL], {"advantages": [np.ones(3)]}, "2 samples, but 3 advantages"),
        ([SMALL], {"order": "zigzag", "num_shards": 4}, "has 1 tokens; make it even"),
        (
            [make_group(VIDEO, [3])] * 2,
            {"features": [np.ones((2, 2)), np.ones((2, 4))], "num_rows": 2},
            "features differ",
        ),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(groups, options, named):
    with pytest.raises(ValueError, match=named):
        lay_out(groups, **options)


def test_a_sample_without_its_engine_logps_is_refused():
    sample = Sample(tokens=np.array([1, 2]), logps=np.zeros(1), finish_reason="stop", seed=0)
    group = Rollout(prompt=make_prompt([1, 2]), samples=(sample,), policy_version=0)
    with pytest.raises(ValueError, match="2 tokens, but 1 engine logps"):
        lay_out([group])


def test_impossible_splits_are_named():
    batch, _ = lay_out([SMALL], num_rows=3, num_shards=2)
    with pytest.raises(ValueError, match="3 rows are not a multiple of batch.rows_per_pass=2"):
        split_passes(batch, 2)
    with pytest.raises(ValueError, match=r"laid out for 2 shards, but mesh.seq=8"):
        place(batch, make_mesh(seq=8))
    with pytest.raises(ValueError, match=r"3 rows do not split over mesh.data \* mesh.fsdp = 4"):
        place(batch, make_mesh(data=2, fsdp=2, seq=2))
