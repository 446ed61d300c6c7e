"""Attention with all tokens and some heads on a device: heads are exchanged for tokens and back.

Source: Jacobs et al. 2023, arXiv:2309.14509 (DeepSpeed-Ulysses); inside a ring as in USP,
arXiv:2405.07719. Letters are those of ring_attention.py; u devices exchange.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def ulysses_attention(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t K H"],
    order: Int[Array, "B t"],
    branch: Int[Array, "B t"],
    segment: Int[Array, "B t"],
    *,
    axis: str,
    size: int,
    num_devices: int,
    inner: Callable[..., jax.Array],
) -> Float[Array, "B t N H"]:
    """One device's part, to be called inside shard_map; N must be a multiple of size.

    `size` neighbours on the axis (of num_devices) put their tokens together, each for N / size of
    the heads, and call `inner` (attention, in the arguments of this function) on them.
    """
    neighbours = [list(range(i, i + size)) for i in range(0, num_devices, size)]
    exchange = functools.partial(
        lax.all_to_all, axis_name=axis, axis_index_groups=neighbours, tiled=True
    )
    gather = functools.partial(
        lax.all_gather, axis_name=axis, axis_index_groups=neighbours, axis=1, tiled=True
    )
    k, v = (_repeated(x, size) for x in (k, v))
    q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    o = inner(q, k, v, *(gather(x) for x in (order, branch, segment)))
    return exchange(o, split_axis=1, concat_axis=2)


def ulysses_size(
    num_heads: int, *, kind: str, ulysses: int = 0, seq: int = 1, tensor: int = 1
) -> int:
    """Returns how many neighbours of mesh axis seq exchange heads; the ring has seq / that many.

    num_heads: query heads of the model, which mesh axis tensor divides first. ulysses: for kind
    "2d"; 0: as many as the heads allow. Raises ValueError with what would work.
    """
    fits = [u for u in range(1, seq + 1) if seq % u == 0 and num_heads // tensor % u == 0]
    size = {"ring": 1, "ulysses": seq, "2d": ulysses or fits[-1]}[kind]
    if ulysses and kind != "2d":
        raise ValueError(
            f"attention ulysses={ulysses} is for kind '2d', the kind is {kind!r}; change one"
        )
    if size in fits and (kind != "2d" or size > 1 or seq == 1):
        return size
    asked = f"{kind!r} with ulysses={ulysses}" if ulysses else repr(kind)
    heads = f"{num_heads} query heads" + (f" over tensor={tensor}" if tensor > 1 else "")
    raise ValueError(
        f"attention kind {asked} cannot share {heads} and the {seq} devices of mesh axis seq; "
        f"these can: {', '.join(_combinations(fits, seq))}"
    )


def _combinations(fits: Sequence[int], seq: int) -> list[str]:
    both = [f"'2d' with ulysses={u} (in a ring of {seq // u})" for u in fits if 1 < u < seq]
    return ["'ring'", *both, *(["'ulysses'"] if seq in fits else [])]


def _repeated(x_btKH: jax.Array, size: int) -> jax.Array:
    """Repeats key/value heads just so often that `size` devices can share them.

    Device i then gets the heads that its query heads, N / size from i * N / size, belong to.
    """
    num_heads = x_btKH.shape[2]
    return jnp.repeat(x_btKH, math.lcm(num_heads, size) // num_heads, axis=2)
