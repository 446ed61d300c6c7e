"""Attention over rows whose tokens are split along the mesh axis "seq"."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from longrl_jax.sharding import blockwise, pallas_attention
from longrl_jax.sharding.ring_attention import Kernel, Ring, ring_attention
from longrl_jax.sharding.rules import num_parts, spec
from longrl_jax.sharding.ulysses import ulysses_attention, ulysses_size

KINDS = ("ring", "ulysses", "2d")
KERNELS = {
    "xla": Kernel(blockwise.blockwise_forward, blockwise.blockwise_backward, block_size=512),
    "pallas": Kernel(
        pallas_attention.pallas_forward, pallas_attention.pallas_backward, block_size=64
    ),
}


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    order: Int[Array, "B T"],
    branch: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    kind: str = "ring",
    ulysses: int = 0,
    kernel: str = "xla",
    layout: Any = None,
    block_size: int | None = None,
) -> Float[Array, "B T N H"]:
    """Exact attention over group rows, on the mesh of jax.set_mesh (or one device without one).

    A query sees a key iff both have one segment, order_k <= order_q, and branch_k is 0 (the shared
    prefix) or branch_q. Segment 0 is padding: it sees nothing, is not seen, costs no tile, and its
    output is 0. The three ids travel with the keys, so tokens may stand in any order.

    kind: how the devices of mesh axis seq share a row. "ring": keys and values go round them.
        "ulysses": each takes all tokens for some of the heads. "2d": `ulysses` neighbours (a
        divisor of seq; 0: as many as the heads allow) share heads, their groups make a ring.
    kernel: "xla", or "pallas": a Triton kernel for GPUs, which a CPU interprets (for tests).
    layout: for kernels that need a static mask; there is none yet, so it must be None.
    block_size: tokens on each side of a tile; None: the kernel's own.
    """
    for name, value, known in (("kind", kind, KINDS), ("kernel", kernel, KERNELS)):
        if value not in known:
            raise ValueError(
                f"attention {name} {value!r} is unknown; choose one of {', '.join(known)}"
            )
    if layout is not None:
        raise ValueError(f"attention kernel {kernel!r} takes no layout, got {layout!r}; pass None")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads"
        )
    tiles = KERNELS[kernel]
    tiles = tiles._replace(block_size=block_size or tiles.block_size)
    seq, tensor = num_parts("tokens"), num_parts("heads")
    size = ulysses_size(q.shape[2], kind=kind, ulysses=ulysses, seq=seq, tensor=tensor)
    if jax.sharding.get_abstract_mesh().empty:
        return ring_attention(q, k, v, order, branch, segment, ring=Ring(), kernel=tiles)
    for name, num, dim in (
        ("rows", q.shape[0], "batch"),
        ("tokens", q.shape[1], "tokens"),
        ("key/value heads", k.shape[2], "heads"),
    ):
        if num % num_parts(dim):
            raise ValueError(
                f"{num} {name} do not split over the {num_parts(dim)} devices of {dim!r} "
                f"(mesh {spec(dim)[0]}); pad them or change mesh.*"
            )
    axis = spec("tokens")[0]
    ring = Ring(axis, size=seq // size, stride=size)
    local = functools.partial(ring_attention, ring=ring, kernel=tiles)
    if size > 1:
        local = functools.partial(
            ulysses_attention, axis=axis, size=size, num_devices=seq, inner=local
        )
    heads, tokens = spec("batch", "tokens", "heads", None), spec("batch", "tokens")
    mapped = jax.shard_map(
        local,
        in_specs=(heads, heads, heads, tokens, tokens, tokens),
        out_specs=heads,
        check_vma=kernel != "pallas",  # its interpreter mixes constants with what varies
    )
    return mapped(q, k, v, order, branch, segment)
