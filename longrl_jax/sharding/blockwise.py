"""Attention of some queries to some keys, tile by tile, in plain XLA; and all at once (dense).

Source: the online softmax of Milakov & Gimelshein 2018, arXiv:1805.02867; the backward pass from
the log-sum-exp as in FlashAttention-2, arXiv:2307.08691.

Letters are those of longrl_jax/types.py: B rows, T tokens, S keys, N query heads, K key/value
heads, G = N / K, H head dim. A tile is one block of queries against one block of keys; q and k are
their block sizes, n the number of blocks. Keys and values are turned ([..., H, k]) where a product
sums over H, dk and dv while they are summed: no array of a tile's size is transposed, which is
slow on CPUs (benchmarks/results/ring_attention_cpu2_202611.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longrl_jax.sharding.visibility import (
    NEG_INF,
    Ids,
    Ranges,
    all_see,
    block_ranges,
    may_see,
    visible,
)


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    order: Int[Array, "B T"],
    branch: Int[Array, "B T"],
    segment: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """The reference: one device, the whole score matrix at once."""
    B, T, N, H = q.shape
    q_BTKGH = q.reshape(B, T, k.shape[2], -1, H)
    score = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k, preferred_element_type=wide_type(q))
    see_BTS = visible((order, branch, segment), (order, branch, segment))
    see = see_BTS[:, None, None]
    weight = jnp.where(see, jax.nn.softmax(jnp.where(see, score * H**-0.5, NEG_INF)), 0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weight.astype(v.dtype), v)
    return out.reshape(q.shape).astype(q.dtype)


def blockwise_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_ids: Ids,
    k_ids: Ids,
    block_size: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention in tiles: the output and the log-sum-exp of the scores, both at least float32.

    A query that sees nothing gets 0 and NEG_INF. Tiles without a visible pair are skipped,
    tiles with visible pairs only are not masked.
    """
    wide, scale = wide_type(q), q.shape[-1] ** -0.5
    q_blocks = _query_blocks(q, k.shape[2], block_size)
    k_blocks = jnp.swapaxes(_blocks(k, block_size), -1, -2), _blocks(v, block_size)
    q_ids_n, k_ids_n = _id_blocks(q_ids, block_size), _id_blocks(k_ids, block_size)
    q_blocks, q_ids_n, k_blocks, k_ids_n = _tie((q_blocks, q_ids_n, k_blocks, k_ids_n))

    def query_block(xs):
        q_BKGqH, q_ids_Bq, q_ranges_B = xs

        def fold(carry, ys):
            (k_BKHk, v_BKkH), k_ids_Bk, k_ranges_B = ys

            def tile(masked, carry):
                num, den, top = carry
                score = _einsum("BKGqH,BKHk->BKGqk", q_BKGqH, k_BKHk, wide) * scale
                see = visible(q_ids_Bq, k_ids_Bk)[:, None, None] if masked else True
                score = jnp.where(see, score, NEG_INF)
                new_top = jnp.maximum(top, score.max(-1))
                weight = jnp.where(see, jnp.exp(score - new_top[..., None]), 0)
                shrink = jnp.exp(top - new_top)
                part = _einsum("BKGqk,BKkH->BKGqH", weight.astype(v.dtype), v_BKkH, wide)
                return num * shrink[..., None] + part, den * shrink + weight.sum(-1), new_top

            return _fold(tile, q_ranges_B, k_ranges_B, carry), None

        empty = jnp.zeros(q_BKGqH.shape, wide), jnp.zeros(q_BKGqH.shape[:-1], wide)
        start = vary_like((*empty, jnp.full_like(empty[1], NEG_INF)), q, k)
        (num, den, top), _ = lax.scan(fold, start, (k_blocks, k_ids_n, block_ranges(k_ids_n)))
        safe_den = jnp.where(den == 0, 1, den)
        lse = jnp.where(den == 0, NEG_INF, top + jnp.log(safe_den))
        return num / safe_den[..., None], lse

    o_nBKGqH, lse_nBKGq = lax.map(query_block, (q_blocks, q_ids_n, block_ranges(q_ids_n)))
    return _unblock_queries(o_nBKGqH, q), _unblock_queries(lse_nBKGq, q)


def blockwise_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_ids: Ids,
    k_ids: Ids,
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    do: Float[Array, "B T N H"],
    block_size: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dq, dk and dv of these keys. lse is over *all* keys of the row, delta = sum(o * do)."""
    wide, scale, K = wide_type(q), q.shape[-1] ** -0.5, k.shape[2]
    q_side = tuple(_query_blocks(x, K, block_size) for x in (q, do, lse, delta))
    q_ids_n, k_ids_n = _id_blocks(q_ids, block_size), _id_blocks(k_ids, block_size)
    k_side = _blocks(k, block_size), jnp.swapaxes(_blocks(v, block_size), -1, -2)
    q_side, q_ids_n, k_side, k_ids_n = _tie((q_side, q_ids_n, k_side, k_ids_n))
    q_ranges_n = block_ranges(q_ids_n)

    def key_block(dq_nBKGqH, xs):
        (k_BKkH, v_BKHk), k_ids_Bk, k_ranges_B = xs
        k_BKHk = jnp.swapaxes(k_BKkH, -1, -2)

        def fold(carry, ys):
            (q_BKGqH, do_BKGqH, lse_BKGq, delta_BKGq), q_ids_Bq, q_ranges_B, dq_BKGqH = ys

            def tile(masked, carry):
                (dk, dv), dq_BKGqH = carry
                score = _einsum("BKGqH,BKHk->BKGqk", q_BKGqH, k_BKHk, wide) * scale
                see = visible(q_ids_Bq, k_ids_Bk)[:, None, None] if masked else True
                weight = jnp.exp(jnp.where(see, score - lse_BKGq[..., None], NEG_INF))
                do_BKHGq, q_BKHGq = jnp.moveaxis(do_BKGqH, -1, 2), jnp.moveaxis(q_BKGqH, -1, 2)
                dv += _einsum("BKHGq,BKGqk->BKHk", do_BKHGq, weight.astype(do.dtype), wide)
                dweight = _einsum("BKGqH,BKHk->BKGqk", do_BKGqH, v_BKHk, wide)
                dscore = (weight * (dweight - delta_BKGq[..., None]) * scale).astype(q.dtype)
                dk += _einsum("BKHGq,BKGqk->BKHk", q_BKHGq, dscore, wide)
                dq_BKGqH += _einsum("BKGqk,BKkH->BKGqH", dscore, k_BKkH, wide)
                return (dk, dv), dq_BKGqH

            return _fold(tile, q_ranges_B, k_ranges_B, (carry, dq_BKGqH))

        zeros = vary_like((jnp.zeros(k_BKHk.shape, wide), jnp.zeros(v_BKHk.shape, wide)), q, k)
        queries = (q_side, q_ids_n, q_ranges_n, dq_nBKGqH)
        (dk, dv), dq_nBKGqH = lax.scan(fold, zeros, queries)
        return dq_nBKGqH, (jnp.swapaxes(dk, -1, -2), jnp.swapaxes(dv, -1, -2))

    start = vary_like(jnp.zeros(q_side[0].shape, wide), q, k)
    keys = (k_side, k_ids_n, block_ranges(k_ids_n))
    dq_nBKGqH, (dk, dv) = lax.scan(key_block, start, keys)
    return _unblock_queries(dq_nBKGqH, q), _unblock(dk, k), _unblock(dv, v)


def _fold(tile: Callable[[bool, Any], Any], q: Ranges, k: Ranges, carry: Any) -> Any:
    """Skips a tile that no row needs, and masks one that not all rows see wholly.

    tile(masked, carry) -> carry.
    """
    case = may_see(q, k).any().astype(jnp.int32) + all_see(q, k).all()
    cases = (lambda same: same, functools.partial(tile, True), functools.partial(tile, False))
    return lax.switch(case, cases, carry)


def _tie(arrays: Any) -> Any:
    """Keeps masks inside a scan over layers. They depend on ids only, the same in every layer, so
    JAX would hoist them out of that scan and save every tile: 410 GiB instead of 30 at 7B, 262k."""
    return lax.optimization_barrier(arrays)


def _query_blocks(x: jax.Array, num_kv_heads: int, block_size: int) -> jax.Array:
    """[B, T, N, ...] -> [n, B, K, G, q, ...]."""
    B, T, N, *rest = x.shape
    n, block = num_blocks(T, block_size)
    x = _padded(x, block_size).reshape(B, n, block, num_kv_heads, N // num_kv_heads, *rest)
    return jnp.moveaxis(x, (1, 2), (0, 4))


def _unblock_queries(x: jax.Array, like: jax.Array) -> jax.Array:
    """[n, B, K, G, q, ...] -> [B, T, N, ...]."""
    B, T, N = like.shape[:3]
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    return x.reshape(B, x.shape[1] * x.shape[2], N, *x.shape[5:])[:, :T]


def _blocks(x: jax.Array, block_size: int) -> jax.Array:
    """[B, S, K, H] -> [n, B, K, k, H]."""
    n, block = num_blocks(x.shape[1], block_size)
    x = _padded(x, block_size)
    return jnp.moveaxis(x.reshape(x.shape[0], n, block, *x.shape[2:]), (1, 2), (0, 3))


def _unblock(x: jax.Array, like: jax.Array) -> jax.Array:
    """[n, B, K, k, H] -> [B, S, K, H]."""
    x = jnp.moveaxis(x, (0, 3), (1, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]]


def _id_blocks(ids: Ids, block_size: int) -> Ids:
    """[B, T] -> [n, B, q]; what fills the last block is padding like any other (segment 0)."""
    n, block = num_blocks(ids[0].shape[1], block_size)
    order, branch, segment = (
        jnp.moveaxis(_padded(x, block_size).reshape(x.shape[0], n, block), 1, 0) for x in ids
    )
    return order, branch, segment


def num_blocks(num_tokens: int, block_size: int) -> tuple[int, int]:
    """Number and size of equal blocks, at most block_size, that hold num_tokens."""
    n = -(-num_tokens // block_size)
    return n, -(-num_tokens // n)


def _padded(x: jax.Array, block_size: int) -> jax.Array:
    n, block = num_blocks(x.shape[1], block_size)
    widths = [(0, 0), (0, n * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths)


def vary_like(arrays: Any, *others: jax.Array) -> Any:
    """Marks constants as different on every device, as the carries of a scan in shard_map must."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in others))
    if not axes:
        return arrays
    return jax.tree.map(lambda x: lax.pcast(x, tuple(axes), to="varying"), arrays)


def wide_type(x: jax.Array) -> Any:
    """Type that sums are kept in: float32, or float64 for float64 arrays."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _einsum(formula: str, a: jax.Array, b: jax.Array, wide: Any) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=wide)
