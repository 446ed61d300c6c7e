"""The local kernel for GPUs: Pallas through Triton, with the ids and the skipped tiles of ours.

Source: FlashAttention-2, arXiv:2307.08691; what a tile computes is what blockwise.py computes. A
CPU interprets it, which is slow and meant for tests.

Letters are those of blockwise.py. Ids go in as [B, 3, T], their ranges by block as [B, 6, n], the
numbers of a query (lse, delta) as [B, N, T]. One program makes one block of one head of one row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from longrl_jax.sharding.blockwise import wide_type
from longrl_jax.sharding.visibility import NEG_INF, Ids, Ranges, block_ranges, may_see, visible

SMALLEST = 16
"""Fewest rows and columns that Triton multiplies."""
MAX_SIZE = 2**31
"""Numbers of an array that Triton's 32-bit offsets reach."""


def pallas_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_ids: Ids,
    k_ids: Ids,
    block_size: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The output and the log-sum-exp of the scores, as blockwise_forward."""
    B, T, N, H = q.shape
    G, scale = N // k.shape[2], H**-0.5
    q, k, v = (_padded(x, block_size) for x in (q, k, v))
    _check(q, k, block_size)
    q_rows, k_rows = _id_rows(q_ids, block_size), _id_rows(k_ids, block_size)
    queries, keys = _block_specs(q, q_rows, block_size), _whole_specs(k, k_rows, G)
    o, lse_BNT = _call(
        functools.partial(_forward_kernel, scale=scale, block=block_size),
        (q, *q_rows, k, v, *k_rows),
        grid=(q.shape[1] // block_size, N, B),
        in_specs=[*queries, keys[0], *keys],
        out_specs=[queries[0], _per_query_spec(block_size)],
        out_shape=[_like(q), jax.ShapeDtypeStruct((B, N, q.shape[1]), wide_type(q))],
        cost_estimate=_cost(q, k, products=2),
    )
    return o[:, :T, :, :H], jnp.moveaxis(lse_BNT, 1, 2)[:, :T]


def pallas_backward(
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
    """dq, dk and dv, as blockwise_backward: one kernel makes dq, another dk and dv."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G, scale = N // K, H**-0.5
    q, k, v, do = (_padded(x, block_size) for x in (q, k, v, do))
    _check(q, k, block_size)
    q_rows, k_rows = _id_rows(q_ids, block_size), _id_rows(k_ids, block_size)
    more = ((0, 0), (0, 0), (0, q.shape[1] - T))
    lse_BNT, delta_BNT = (jnp.pad(jnp.moveaxis(x, 2, 1), more) for x in (lse, delta))
    arrays = (q, *q_rows, do, lse_BNT, delta_BNT, k, v, *k_rows)

    queries, keys = _block_specs(q, q_rows, block_size), _whole_specs(k, k_rows, G)
    numbers = [_per_query_spec(block_size)] * 2
    dq = _call(
        functools.partial(_dq_kernel, scale=scale, block=block_size),
        arrays,
        grid=(q.shape[1] // block_size, N, B),
        in_specs=[*queries, queries[0], *numbers, keys[0], *keys],
        out_specs=queries[0],
        out_shape=_like(q),
        cost_estimate=_cost(q, k, products=3),
    )
    keys = _block_specs(k, k_rows, block_size)
    whole = pl.BlockSpec((None, q.shape[1], G, q.shape[3]), lambda j, h, b: (b, 0, h, 0))
    ids = [pl.BlockSpec((None, *x.shape[1:]), lambda j, h, b: (b, 0, 0)) for x in q_rows]
    numbers = [pl.BlockSpec((None, G, q.shape[1]), lambda j, h, b: (b, h, 0))] * 2
    dk, dv = _call(
        functools.partial(_dkv_kernel, scale=scale, block=block_size),
        arrays,
        grid=(k.shape[1] // block_size, K, B),
        in_specs=[whole, *ids, whole, *numbers, keys[0], *keys],
        out_specs=[keys[0], keys[0]],
        out_shape=[_like(k), _like(v)],
        cost_estimate=_cost(q, k, products=4),
    )
    return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :H]


def _forward_kernel(
    q_ref, q_ids_ref, q_ranges_ref, k_ref, v_ref, k_ids_ref, k_ranges_ref, o_ref, lse_ref,
    *, scale: float, block: int,
):  # fmt: skip
    q_qH, q_ids = q_ref[...], _ids(q_ids_ref, 0, block)
    wide = o_ref.dtype

    def tile(keys, carry):
        num, den, top = carry
        see = visible(q_ids, _ids(k_ids_ref, keys, block))
        score = _einsum("qH,kH->qk", q_qH, k_ref[pl.ds(keys, block), :], wide) * scale
        score = jnp.where(see, score, NEG_INF)
        new_top = jnp.maximum(top, score.max(-1))
        weight = jnp.where(see, jnp.exp(score - new_top[:, None]), 0)
        shrink = jnp.exp(top - new_top)
        v_kH = v_ref[pl.ds(keys, block), :]
        part = _einsum("qk,kH->qH", weight.astype(v_kH.dtype), v_kH, wide)
        return num * shrink[:, None] + part, den * shrink + weight.sum(-1), new_top

    empty = jnp.zeros(q_qH.shape, wide), jnp.zeros(block, wide), jnp.full(block, NEG_INF, wide)
    num, den, top = _over_tiles(tile, empty, q_ranges_ref, k_ranges_ref, block)
    safe_den = jnp.where(den == 0, 1, den)
    o_ref[...] = num / safe_den[:, None]
    lse_ref[...] = jnp.where(den == 0, NEG_INF, top + jnp.log(safe_den))


def _dq_kernel(
    q_ref, q_ids_ref, q_ranges_ref, do_ref, lse_ref, delta_ref,
    k_ref, v_ref, k_ids_ref, k_ranges_ref, dq_ref, *, scale: float, block: int,
):  # fmt: skip
    q_qH, do_qH, q_ids = q_ref[...], do_ref[...], _ids(q_ids_ref, 0, block)
    lse_q, delta_q, wide = lse_ref[...], delta_ref[...], dq_ref.dtype

    def tile(keys, dq_qH):
        k_kH, v_kH = k_ref[pl.ds(keys, block), :], v_ref[pl.ds(keys, block), :]
        see = visible(q_ids, _ids(k_ids_ref, keys, block))
        score = _einsum("qH,kH->qk", q_qH, k_kH, wide) * scale
        weight = jnp.exp(jnp.where(see, score - lse_q[:, None], NEG_INF))
        dweight = _einsum("qH,kH->qk", do_qH, v_kH, wide)
        dscore = (weight * (dweight - delta_q[:, None]) * scale).astype(q_qH.dtype)
        return dq_qH + _einsum("qk,kH->qH", dscore, k_kH, wide)

    zeros = jnp.zeros(q_qH.shape, wide)
    dq_ref[...] = _over_tiles(tile, zeros, q_ranges_ref, k_ranges_ref, block)


def _dkv_kernel(
    q_ref, q_ids_ref, q_ranges_ref, do_ref, lse_ref, delta_ref,
    k_ref, v_ref, k_ids_ref, k_ranges_ref, dk_ref, dv_ref, *, scale: float, block: int,
):  # fmt: skip
    k_kH, v_kH, k_ids = k_ref[...], v_ref[...], _ids(k_ids_ref, 0, block)
    num_heads, wide = q_ref.shape[1], dk_ref.dtype

    def tile(queries, carry):
        at = pl.ds(queries, block)
        see = visible(_ids(q_ids_ref, queries, block), k_ids)

        def head(g, carry):
            dk_kH, dv_kH = carry
            q_qH, do_qH = q_ref[at, g, :], do_ref[at, g, :]
            score = _einsum("qH,kH->qk", q_qH, k_kH, wide) * scale
            weight = jnp.exp(jnp.where(see, score - lse_ref[g, at][:, None], NEG_INF))
            dv_kH += _einsum("qk,qH->kH", weight.astype(do_qH.dtype), do_qH, wide)
            dweight = _einsum("qH,kH->qk", do_qH, v_kH, wide)
            dscore = (weight * (dweight - delta_ref[g, at][:, None]) * scale).astype(q_qH.dtype)
            return dk_kH + _einsum("qk,qH->kH", dscore, q_qH, wide), dv_kH

        return lax.fori_loop(0, num_heads, head, carry)  # of the query heads of this key head

    zeros = jnp.zeros(k_kH.shape, wide), jnp.zeros(v_kH.shape, wide)
    dk_kH, dv_kH = _over_tiles(tile, zeros, q_ranges_ref, k_ranges_ref, block, over="queries")
    dk_ref[...], dv_ref[...] = dk_kH, dv_kH


def _over_tiles(
    tile: Callable[[Any, Any], Any], start: Any, q_ranges_ref, k_ranges_ref, block: int,
    *, over: str = "keys",
) -> Any:  # fmt: skip
    """Folds `tile` over the blocks of one side that this program's block may see, or be seen by."""
    many = k_ranges_ref if over == "keys" else q_ranges_ref

    def fold(i, carry):
        q, k = (
            Ranges(*(ref[x, i if ref is many else 0] for x in range(len(Ranges._fields))))
            for ref in (q_ranges_ref, k_ranges_ref)
        )
        return lax.cond(may_see(q, k), lambda c: tile(i * block, c), lambda same: same, carry)

    return lax.fori_loop(0, many.shape[1], fold, start)


def _ids(ref, start, block: int) -> Ids:
    order, branch, segment = (ref[i, pl.ds(start, block)] for i in range(3))
    return order, branch, segment


def _einsum(formula: str, a: jax.Array, b: jax.Array, wide: Any) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=wide)


def _call(kernel: Callable[..., None], arrays: Sequence[jax.Array], **options: Any) -> Any:
    def run(*arrays: jax.Array, interpret: bool) -> Any:
        warps = 4 if arrays[0].shape[-1] <= 64 else 8
        params = triton.CompilerParams(num_warps=warps, num_stages=2)
        call = pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **options)
        return call(*arrays)

    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(run, interpret=True),
        cuda=functools.partial(run, interpret=False),
    )


def _cost(q: jax.Array, k: jax.Array, *, products: int) -> pl.CostEstimate:
    """Of all tiles, skipped ones too; each multiplies `products` times (2 FLOPs a multiply-add)."""
    B, T, N, H = q.shape
    pairs = B * N * T * k.shape[1]
    size = sum(x.size * x.dtype.itemsize for x in (q, k, k))
    return pl.CostEstimate(
        flops=2 * products * pairs * H, transcendentals=pairs, bytes_accessed=size
    )


def _block_specs(x: jax.Array, rows: Sequence[jax.Array], block: int) -> list[pl.BlockSpec]:
    """Of x [B, T, heads, H], its ids and their ranges: what block i of head h and row b is."""
    return [
        pl.BlockSpec((None, block, None, x.shape[3]), lambda i, h, b: (b, i, h, 0)),
        pl.BlockSpec((None, 3, block), lambda i, h, b: (b, 0, i)),
        pl.BlockSpec((None, rows[1].shape[1], 1), lambda i, h, b: (b, 0, i)),
    ]


def _whole_specs(x: jax.Array, rows: Sequence[jax.Array], G: int) -> list[pl.BlockSpec]:
    """The same for all keys of query head h's key head."""
    return [
        pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, h, b: (b, 0, h // G, 0)),
        *(pl.BlockSpec((None, *y.shape[1:]), lambda i, h, b: (b, 0, 0)) for y in rows),
    ]


def _per_query_spec(block: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i))


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, wide_type(x))


def _id_rows(ids: Ids, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns ids [B, 3, T] and their ranges [B, 7, n]; what fills the last block is padding."""
    ids_B3T = jnp.stack(ids, axis=1)
    ids_B3T = jnp.pad(ids_B3T, ((0, 0), (0, 0), (0, -ids_B3T.shape[2] % block)))
    ids_3Bnq = jnp.moveaxis(ids_B3T.reshape(len(ids_B3T), 3, -1, block), 1, 0)
    return ids_B3T, jnp.stack(block_ranges((ids_3Bnq[0], ids_3Bnq[1], ids_3Bnq[2])), axis=1)


def _padded(x: jax.Array, block: int) -> jax.Array:
    """Whole blocks of tokens, and a head dim that Triton takes: a power of 2."""
    H = x.shape[3]
    width = max(pl.next_power_of_2(H), SMALLEST)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, width - H)))


def _check(q: jax.Array, k: jax.Array, block_size: int) -> None:
    if block_size < SMALLEST or block_size & (block_size - 1):
        raise ValueError(
            f"attention block_size={block_size} must be a power of 2, and at least {SMALLEST}, for "
            "kernel 'pallas'"
        )
    for name, x in (("queries", q), ("keys", k)):
        if x.size >= MAX_SIZE:
            raise ValueError(
                f"{name} {x.shape} of one device are {x.size} numbers, kernel 'pallas' reaches "
                f"{MAX_SIZE - 1}; raise mesh.seq, or take kernel 'xla'"
            )
