"""Ring attention equals attention on one device, which equals a loop; value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import compare, make_case, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from longrl_jax.sharding import attend, blockwise, dense_attention, make_mesh
from longrl_jax.sharding.visibility import all_see, block_ranges, may_see, visible

LOOP_ATOL = 1e-5  # float32 against a float64 loop
NUM_DEVICES = 8


def test_dense_equals_a_loop():
    (q, k, v, _), ids = make_case(0, B=3, T=24, N=4, K=2, H=4)
    got = dense_attention(*map(jnp.asarray, (q, k, v)), *ids)
    order, branch, segment = ids
    want = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(q.shape[1])
            if segment[b, s] == segment[b, t] > 0
            and order[b, s] <= order[b, t]
            and branch[b, s] in (0, branch[b, t])
        ]
        if not seen:  # padding
            continue
        score = np.array([q[b, t, n].astype(float) @ k[b, s, n // 2] for s in seen]) / 2.0
        weight = np.exp(score - score.max())
        want[b, t, n] = weight / weight.sum() @ v[b, seen, n // 2].astype(float)
    np.testing.assert_allclose(got, want, rtol=0, atol=LOOP_ATOL)


@pytest.mark.parametrize("seq", [1, 2, 4, 8])
def test_ring_equals_dense(seq):
    assert jax.device_count() == NUM_DEVICES
    arrays, ids = make_case(seq)
    mesh = make_mesh(data=NUM_DEVICES // seq, seq=seq)
    with jax.set_mesh(mesh):
        got = value_and_gradients(lambda *a: attend(*a, block_size=16), arrays, ids)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


@pytest.mark.parametrize("shape", [{"fsdp": 2, "seq": 2, "tensor": 2}, {"seq": 4, "tensor": 2}])
def test_ring_equals_dense_with_heads_split(shape):
    arrays, ids = make_case(9)
    with jax.set_mesh(make_mesh(**shape)):
        got = value_and_gradients(lambda *a: attend(*a, block_size=16), arrays, ids)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


@pytest.mark.parametrize("block_size", [7, 64, 512])
def test_one_device_equals_dense_for_any_block(block_size):
    arrays, ids = make_case(3, B=2, T=101)
    got = value_and_gradients(lambda *a: attend(*a, block_size=block_size), arrays, ids)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


def test_tiles_without_a_visible_pair_change_nothing():
    arrays, _ = make_case(4, B=2, T=64)
    ids = np.zeros((3, 2, 64), np.int32)
    ids[0] = np.arange(64)[::-1]  # keys of late tiles come early: half of the tiles are skipped
    ids[2] = np.repeat([1, 2], 32)  # and tiles across segments
    got = value_and_gradients(lambda *a: attend(*a, block_size=8), arrays, ids)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


BLOCK_IDS = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=3, max_size=3)
"""(order, branch, segment) of three tokens, padding among them."""


@settings(max_examples=500, deadline=None)
@given(BLOCK_IDS, BLOCK_IDS)
def test_a_tile_is_skipped_or_unmasked_only_if_its_mask_says_so(queries, keys):
    q_ids, k_ids = (tuple(np.array(x, np.int32).T) for x in (queries, keys))
    see = visible(q_ids, k_ids)
    q, k = block_ranges(q_ids), block_ranges(k_ids)
    assert not all_see(q, k) or see.all()
    assert may_see(q, k) or not see.any()
    plain = all(len({*x}) == 1 for x in (*q_ids[1:], *k_ids[1:]))
    if plain:  # one branch and segment on each side: the test misses nothing
        assert all_see(q, k) == see.all()


def test_tiles_that_see_all_are_not_masked(monkeypatch):
    """With a mask that hides everything, what values and cotangents still reach is unmasked."""
    monkeypatch.setattr(blockwise, "visible", lambda q, k: visible(q, k) & False)
    num_blocks, size = 7, 4
    order = [*range(16), *range(8, 16), *range(20, 24)]
    branch = np.repeat([0, 0, 1, 1, 2, 2, 0], size)
    segment = np.repeat([1, 1, 1, 1, 1, 1, 2], size)
    segment[23] = 0  # one token of padding in block 5
    ids = np.array([[order, order], [branch, branch], [segment, segment]], np.int32)
    ids[2, 1, 0] = 0  # the other row has padding in block 0
    (q, k, _, _), _ = make_case(11, B=2, T=num_blocks * size, N=2, K=1)

    @jax.jit
    def run(q, k, v, cotangent, ids):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *ids, block_size=size), q, k, v)
        return out, *pull(cotangent)

    def unmasked(rows):
        forward, backward = (np.zeros((num_blocks, num_blocks), bool) for _ in "ab")
        for block in range(num_blocks):
            one = np.repeat(np.arange(num_blocks) == block, size).astype(np.float32)
            v, cotangent = (np.broadcast_to(one[:, None, None], x[:rows].shape) for x in (k, q))
            out, _, _, dv = run(q[:rows], k[:rows], v, cotangent, ids[:, :rows])
            forward[:, block] = np.asarray(out)[0].reshape(num_blocks, -1).any(-1)
            backward[block] = np.asarray(dv)[0].reshape(num_blocks, -1).any(-1)
        np.testing.assert_array_equal(forward, backward)
        return forward

    want = np.zeros((num_blocks, num_blocks), bool)
    want[[1, 2, 2, 3, 3, 3, 4, 4], [0, 0, 1, 0, 1, 2, 0, 1]] = True
    np.testing.assert_array_equal(unmasked(rows=1), want)
    want[:, 0] = False
    np.testing.assert_array_equal(unmasked(rows=2), want)


def test_ring_equals_dense_in_float64():
    with jax.enable_x64(True):
        arrays, ids = make_case(5, T=64, dtype=np.float64)
        with jax.set_mesh(make_mesh(data=2, seq=4)):
            got = value_and_gradients(lambda *a: attend(*a, block_size=8), arrays, ids)
        assert got[0].dtype == np.float64
        compare(got, value_and_gradients(dense_attention, arrays, ids), atol=1e-13)


def test_masks_are_not_saved_for_every_layer_and_tile():
    """JAX hoists masks out of a scan over layers, unless they are tied to q (see _tie)."""
    arrays, ids = make_case(6, B=1, T=2048, N=2, K=2, H=8)

    def layers(x, ids):
        def layer(x, _):
            return x + attend(x, x, x, *ids, block_size=64), None

        return jax.lax.scan(jax.checkpoint(layer), x, None, 4)[0].sum()

    compiled = jax.jit(jax.grad(layers)).lower(arrays[0], jnp.asarray(ids)).compile()
    tile_bytes = 2048 * 2048  # every mask of one layer as bool
    assert compiled.memory_analysis().temp_size_in_bytes < tile_bytes


def test_padding_neither_sees_nor_is_seen():
    """By changing what stands there, and by its own output and gradient, on a ring of 8."""
    arrays, ids = make_case(8, B=2, T=64)
    is_padding = ids[2] == 0
    changed = [np.where(is_padding[..., None, None], 1e3, x).astype(np.float32) for x in arrays]

    @jax.jit
    def run(q, k, v):
        return attend(q, k, v, *ids, block_size=4)

    with jax.set_mesh(make_mesh(seq=8)):
        want, got = run(*arrays[:3]), run(*changed[:3])
        gradients = jax.jit(jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2)))(*arrays[:3])
    np.testing.assert_array_equal(got, want)
    for x in (want, *gradients):
        assert not np.asarray(x)[is_padding].any() and np.isfinite(x).all()


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    def temp_bytes(num_tokens):
        arrays, ids = make_case(6, B=2, T=num_tokens, N=2, K=1, H=8)

        def loss(q, k, v):
            return attend(q, k, v, *ids, block_size=64).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays[:3]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(4096) < 4.5 * temp_bytes(1024)


def test_impossible_splits_are_named():
    (q, k, v, _), ids = make_case(7, B=8, T=30)
    with jax.set_mesh(make_mesh(data=2, seq=4)), pytest.raises(ValueError, match="30 tokens"):
        attend(q, k, v, *ids)
    with pytest.raises(
        ValueError, match="kind 'rings' is unknown; choose one of ring, ulysses, 2d"
    ):
        attend(q, k, v, *ids, kind="rings")
    with pytest.raises(ValueError, match="kernel 'cuda' is unknown; choose one of xla, pallas"):
        attend(q, k, v, *ids, kernel="cuda")
