"""How evenly an order of tokens spreads the work of attention over the devices of a ring."""

from typing import Any

import numpy as np
from jaxtyping import Int

from longrl_jax.sharding.blockwise import num_blocks
from longrl_jax.sharding.visibility import Ranges, block_ranges, may_see


def executed_tiles(
    order: Int[np.ndarray, "B T"],
    branch: Int[np.ndarray, "B T"],
    segment: Int[np.ndarray, "B T"],
    *,
    num_devices: int,
    block_size: int,
    ulysses: int = 1,
) -> Int[np.ndarray, "steps num_devices"]:
    """Returns the tiles that every device computes in every step of its ring, of each head.

    The rows are those that one device has at the same time; it skips a tile that no row needs (the
    Pallas kernel skips for each row: count its rows one by one). What decides is the kernels' own
    test, `may_see`. The padding that fills a shard's last block is the one of kernel "xla".
    """
    B, T = order.shape
    size = num_devices // ulysses  # places of the ring; the devices of a place have the same tokens
    n, block = num_blocks(T // size, block_size)

    def blocks(x_BT: np.ndarray) -> Any:
        x_Bdt = x_BT.reshape(B, size, T // size)
        widths = ((0, 0), (0, 0), (0, n * block - T // size))
        return np.pad(x_Bdt, widths).reshape(B, size, n, block)

    ranges = block_ranges((blocks(order), blocks(branch), blocks(segment)))
    q, k = (
        Ranges(*(x[at] for x in ranges))
        for at in (np.s_[:, :, :, None, None], np.s_[:, None, None])
    )
    tiles_dd = np.asarray(may_see(q, k).any(0).sum((1, 3)))
    here = np.arange(size)
    tiles_sd = np.stack([tiles_dd[here, (here - hop) % size] for hop in range(size)])
    return np.repeat(tiles_sd, ulysses, axis=1)


def imbalance(tiles: Int[np.ndarray, "steps num_devices"]) -> float:
    """Returns the time of a ring that waits for its slowest device in every step, over the mean.

    1.0: no device ever waits.
    """
    return float(tiles.max(axis=1).sum() / tiles.mean(axis=1).sum())
