"""Devices and what is split over them; imports jax only, so other projects can use it alone."""

from longrl_jax.sharding.balance import executed_tiles, imbalance
from longrl_jax.sharding.blockwise import dense_attention, num_blocks
from longrl_jax.sharding.mesh import AXES, make_mesh, to_local
from longrl_jax.sharding.rules import RULES, constrain, num_parts, spec
from longrl_jax.sharding.sequence import KERNELS, KINDS, attend
from longrl_jax.sharding.ulysses import ulysses_size

__all__ = [
    "AXES",
    "KERNELS",
    "KINDS",
    "RULES",
    "attend",
    "constrain",
    "dense_attention",
    "executed_tiles",
    "imbalance",
    "make_mesh",
    "num_blocks",
    "num_parts",
    "spec",
    "to_local",
    "ulysses_size",
]
