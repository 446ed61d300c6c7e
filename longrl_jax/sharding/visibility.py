"""Who sees whom: the rule for a pair of tokens, and the bounds for a tile of them.

`ids` are the three numbers of a token that decide it: order, branch, segment (0: padding, which
neither sees nor is seen). They work on arrays of any leading dims, inside kernels too.
"""

from typing import NamedTuple

import jax

NEG_INF = -1e30  # finite: exp(NEG_INF - NEG_INF) must not be nan
BEYOND = 2**31 - 1  # lowest id of a tile of padding: over every id
Ids = tuple[jax.Array, jax.Array, jax.Array]


class Ranges(NamedTuple):
    """Lowest and highest ids of the tokens of a block, without its padding; has it none?"""

    order_low: jax.Array
    order_high: jax.Array
    branch_low: jax.Array
    branch_high: jax.Array
    segment_low: jax.Array
    segment_high: jax.Array
    full: jax.Array


def visible(q_ids: Ids, k_ids: Ids) -> jax.Array:
    """[..., q], [..., k] -> [..., q, k]: may this query see this key?"""
    q_order, q_branch, q_segment = (x[..., :, None] for x in q_ids)
    k_order, k_branch, k_segment = (x[..., None, :] for x in k_ids)
    same_branch = (k_branch == 0) | (k_branch == q_branch)
    same_segment = (k_segment == q_segment) & (k_segment > 0)
    return same_segment & (k_order <= q_order) & same_branch


def block_ranges(ids: Ids) -> Ranges:
    """[..., tokens of a block] -> [...]."""
    is_token = ids[2] > 0
    bounds = []
    for x in ids:  # by methods, so that numpy arrays stay numpy arrays
        bounds += [x.min(-1, where=is_token, initial=BEYOND), x.max(-1, where=is_token, initial=-1)]
    bounds.append(is_token.all(-1))
    return Ranges(*bounds)


def may_see(q: Ranges, k: Ranges) -> jax.Array:
    """False only if no query of the one block sees any key of the other: the tile is skipped."""
    branches = (k.branch_low <= q.branch_high) & (q.branch_low <= k.branch_high)
    segments = (k.segment_low <= q.segment_high) & (q.segment_low <= k.segment_high)
    return (k.order_low <= q.order_high) & segments & (branches | (k.branch_low == 0))


def all_see(q: Ranges, k: Ranges) -> jax.Array:
    """True only if every query of the one block sees every key of the other: no mask is needed."""
    one_segment = (k.segment_low == q.segment_high) & (q.segment_low == k.segment_high)
    one_branch = (k.branch_low == q.branch_high) & (q.branch_low == k.branch_high)
    branches = one_branch | (k.branch_high == 0)
    return q.full & k.full & one_segment & branches & (k.order_high <= q.order_low)
