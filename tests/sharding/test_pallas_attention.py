"""The GPU kernel, interpreted on the CPU, gives dense attention; and both kernels skip alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import compare, make_case, value_and_gradients

from longrl_jax.sharding import attend, dense_attention, executed_tiles, make_mesh

BFLOAT16_RATIO = 1.5  # the same products as kernel "xla", in blocks of another size


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "block_size"),
    [(101, 6, 2, 12, 16), (64, 4, 4, 32, 32), (40, 7, 1, 16, 64)],
)
def test_one_device_equals_dense(T, N, K, H, block_size):
    """Lengths that fill no block, and head dims that Triton does not take."""
    arrays, ids = make_case(T, B=2, T=T, N=N, K=K, H=H)
    got = value_and_gradients(
        lambda *a: attend(*a, kernel="pallas", block_size=block_size), arrays, ids
    )
    compare(got, value_and_gradients(dense_attention, arrays, ids))


@pytest.mark.parametrize(
    ("kind", "ulysses", "seq"),
    [
        ("2d", 2, 4),
        pytest.param("ring", 0, 4, marks=pytest.mark.slow),
        pytest.param("ulysses", 0, 2, marks=pytest.mark.slow),
    ],
)
def test_every_kind_equals_dense(kind, ulysses, seq):
    arrays, ids = make_case(3, B=2, T=96, N=4, K=2)
    options = {"kind": kind, "ulysses": ulysses, "kernel": "pallas", "block_size": 16}
    with jax.set_mesh(make_mesh(seq=seq, devices=jax.devices()[:seq])):
        got = value_and_gradients(lambda *a: attend(*a, **options), arrays, ids)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


def test_bfloat16_is_as_exact_as_in_xla():
    arrays, ids = make_case(5, B=2, T=64)
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    exact = value_and_gradients(dense_attention, [x.astype(np.float32) for x in narrow], ids)
    xla, pallas = (
        value_and_gradients(lambda *a, k=k: attend(*a, kernel=k, block_size=16), narrow, ids)
        for k in ("xla", "pallas")
    )
    for name, x, y, want in zip(("value", "dq", "dk", "dv"), pallas, xla, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        ours, theirs = (np.linalg.norm(np.asarray(z, np.float32) - want) for z in (x, y))
        assert ours <= BFLOAT16_RATIO * theirs, name


@pytest.mark.parametrize("kernel", ["xla", "pallas"])
def test_the_tiles_that_are_counted_are_those_that_are_computed(kernel):
    """A NaN in a block of values, or of the cotangent, spreads through each computed tile."""
    num_blocks, size = 5, 16
    order = np.array([[*range(40), *range(30, 70)]])  # an order that crosses blocks
    branch, segment = np.zeros_like(order), np.repeat([[1, 2]], 40, axis=1)
    branch[0, 48:64], branch[0, 64:75], segment[0, 75:] = 1, 2, 0
    ids = np.stack([order, branch, segment]).astype(np.int32)
    (q, k, v, cotangent), _ = make_case(0, B=1, T=num_blocks * size, N=2, K=1)

    @jax.jit
    def run(v, cotangent):
        attention = functools.partial(attend, kernel=kernel, block_size=size)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, *ids), q, k, v)
        return out, *pull(cotangent)

    def spoilt(x):
        return np.isnan(np.asarray(x).reshape(num_blocks, -1)).any(-1)

    def with_nan(x, block):
        return np.concatenate([x[:, : block * size], x[:, block * size :][:, :size] * np.nan,
                               x[:, (block + 1) * size :]], axis=1)  # fmt: skip

    forward, to_queries, to_keys = (np.zeros((num_blocks, num_blocks), bool) for _ in "abc")
    for block in range(num_blocks):
        out, dq, _, _ = run(with_nan(v, block), cotangent)
        forward[:, block], to_queries[:, block] = spoilt(out), spoilt(dq)
        _, _, dk, dv = run(v, with_nan(cotangent, block))
        to_keys[block] = spoilt(dk)
        np.testing.assert_array_equal(to_keys[block], spoilt(dv))
    np.testing.assert_array_equal(forward, to_queries)
    np.testing.assert_array_equal(forward, to_keys)
    want = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0],
                     [0, 0, 1, 0, 1]], bool)  # fmt: skip
    # block 1 sees none of block 2, but ranges cannot tell: block 2 has both segments and order 30
    np.testing.assert_array_equal(forward, want)
    assert executed_tiles(*ids, num_devices=1, block_size=size) == want.sum()


def test_it_lowers_for_cuda():
    """To three Triton kernels: forward, dq, and dk with dv; the CPU packages can tell."""
    q, k = (jax.ShapeDtypeStruct((1, 256, n, 128), jnp.bfloat16) for n in (28, 4))
    ids = (jax.ShapeDtypeStruct((1, 256), jnp.int32),) * 3

    def step(q, k, v, *ids):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, *ids, kernel="pallas"), q, k, v)
        return pull(out)

    lowered = jax.jit(step).trace(q, k, k, *ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 3


def test_a_row_beyond_32_bits_is_refused():
    q, k = (jax.ShapeDtypeStruct((1, 2**20, n, 128), jnp.bfloat16) for n in (28, 4))
    ids = (jax.ShapeDtypeStruct((1, 2**20), jnp.int32),) * 3
    with pytest.raises(ValueError, match=r"queries \(1, 1048576, 28, 128\) of one device are 37"):
        jax.eval_shape(functools.partial(attend, kernel="pallas"), q, k, k, *ids)


def test_a_block_that_triton_does_not_take_is_refused():
    (q, k, v, _), ids = make_case(7, B=1, T=32)
    with pytest.raises(ValueError, match="block_size=24 must be a power of 2, and at least 16"):
        attend(q, k, v, *ids, kernel="pallas", block_size=24)
