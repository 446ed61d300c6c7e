"""Exact attention on one device, or with keys and values going round a ring of devices.

Source: Liu et al. 2023, arXiv:2310.01889 (ring of key/value blocks).

What a device does with one block of keys is a `Kernel`: XLA (blockwise.py) or a GPU's
(pallas_attention.py). `ids` are order, branch and segment of visibility.py, each [B, t].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longrl_jax.sharding.blockwise import vary_like, wide_type
from longrl_jax.sharding.visibility import NEG_INF, Ids


class Kernel(NamedTuple):
    """Attention of one device's queries to one block of keys."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    """(q, k, v, q_ids, k_ids, block_size) -> (o, lse), both at least float32."""
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    """(q, k, v, q_ids, k_ids, lse, delta, do, block_size) -> (dq, dk, dv), at least float32.
    lse is over all keys of the row, whichever these are; delta = sum(o * do)."""
    block_size: int
    """Tokens on each side of a tile, unless told."""


class Ring(NamedTuple):
    """Devices of a mesh axis that pass their keys on; `stride` rings lie beside one another."""

    axis: str | None = None
    size: int = 1
    """Devices of one ring; 1: nothing is sent."""
    stride: int = 1
    """Places on the axis from a device to its next: 2 in a ring of 4 makes 0-2-4-6 and 1-3-5-7."""


def ring_attention(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t K H"],
    order: Int[Array, "B t"],
    branch: Int[Array, "B t"],
    segment: Int[Array, "B t"],
    *,
    ring: Ring,
    kernel: Kernel,
) -> Float[Array, "B t N H"]:
    """One device's part, to be called inside shard_map."""
    return _attention(q, k, v, (order, branch, segment), ring, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, ids: Ids, ring: Ring, kernel: Kernel):
    return _ring_forward_local(q, k, v, ids, ring, kernel)[0]


def _ring_forward_local(q, k, v, ids, ring, kernel):
    """Folds every device's keys into this device's queries; keeps what the backward pass needs."""

    def fold(carry, _):
        (o, lse), block = carry
        coming = _send_on(block, ring)  # before folding, so that the transfer may overlap with it
        new_o, new_lse = kernel.forward(q, block[0], block[1], ids, block[2], kernel.block_size)
        return (_merge(o, lse, new_o, new_lse), coming), None

    if ring.size == 1:
        o, lse = kernel.forward(q, k, v, ids, ids, kernel.block_size)
    else:
        empty_lse = jnp.full(q.shape[:3], NEG_INF, wide_type(q))
        empty = vary_like((jnp.zeros(q.shape, wide_type(q)), empty_lse), q)
        ((o, lse), _), _ = lax.scan(fold, (empty, (k, v, ids)), None, ring.size)
    o = o.astype(q.dtype)
    return o, (q, k, v, ids, o, lse)


def _ring_backward_local(ring, kernel, kept, do):
    """dk and dv travel with their keys and are home after the last hop."""
    q, k, v, ids, o, lse = kept
    delta = (o.astype(lse.dtype) * do.astype(lse.dtype)).sum(-1)

    def backward(k, v, k_ids):
        return kernel.backward(q, k, v, ids, k_ids, lse, delta, do, kernel.block_size)

    def fold(carry, _):
        dq, block, (dk, dv) = carry
        coming, (dk, dv) = _send_on(block, ring), _send_on((dk, dv), ring)
        new = backward(*block)
        return (dq + new[0], coming, (dk + new[1], dv + new[2])), None  # added after the hop

    if ring.size == 1:
        dq, dk, dv = backward(k, v, ids)
    else:
        zeros = vary_like(tuple(jnp.zeros(x.shape, lse.dtype) for x in (q, k, v)), q)
        start = (zeros[0], (k, v, ids), zeros[1:])
        (dq, _, travelled), _ = lax.scan(fold, start, None, ring.size)
        dk, dv = _send_on(travelled, ring)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_ring_forward_local, _ring_backward_local)


def _merge(o, lse, new_o, new_lse):
    """Joins attention over two sets of keys."""
    top = jnp.maximum(lse, new_lse)
    old_w, new_w = jnp.exp(lse - top), jnp.exp(new_lse - top)
    den = old_w + new_w
    o = o * (old_w / den)[..., None] + new_o * (new_w / den)[..., None]
    return o, top + jnp.log(den)


def _send_on(arrays: Any, ring: Ring) -> Any:
    num_devices = ring.size * ring.stride
    to_next = [(i, (i + ring.stride) % num_devices) for i in range(num_devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, to_next), arrays)
