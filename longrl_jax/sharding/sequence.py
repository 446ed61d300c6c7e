"""Attention over rows whose tokens are split along the mesh axis "seq"."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from longrl_jax.sharding.ring_attention import ring_attention
from longrl_jax.sharding.rules import num_parts, spec

KINDS = {"ring": ring_attention}


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    order: Int[Array, "B T"],
    branch: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    kind: str = "ring",
    layout: Any = None,
    block_size: int = 512,
) -> Float[Array, "B T N H"]:
    """Exact attention over group rows, on the mesh of jax.set_mesh (or one device without one).

    A query sees a key iff both have one segment, order_k <= order_q, and branch_k is 0 (the shared
    prefix) or branch_q. Segment 0 is padding: it sees nothing, is not seen, costs no tile, and its
    output is 0. The three ids travel with the keys, so tokens may stand in any order.
    `layout` is for kernels that need a static mask; no kind takes one, so it must be None.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if layout is not None:
        raise ValueError(f"attention kind {kind!r} takes no layout, got {layout!r}; pass None")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads"
        )
    local = functools.partial(KINDS[kind], block_size=block_size)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, order, branch, segment, axis=None)
    for name, size, dim in (
        ("rows", q.shape[0], "batch"),
        ("tokens", q.shape[1], "tokens"),
        ("key/value heads", k.shape[2], "heads"),
    ):
        if size % num_parts(dim):
            raise ValueError(
                f"{size} {name} do not split over the {num_parts(dim)} devices of {dim!r} "
                f"(mesh {spec(dim)[0]}); pad them or change mesh.*"
            )
    heads, tokens = spec("batch", "tokens", "heads", None), spec("batch", "tokens")
    mapped = jax.shard_map(
        functools.partial(local, axis=spec("tokens")[0]),
        in_specs=(heads, heads, heads, tokens, tokens, tokens),
        out_specs=heads,
    )
    return mapped(q, k, v, order, branch, segment)
