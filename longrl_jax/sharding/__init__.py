"""Devices and what is split over them; imports jax only, so other projects can use it alone."""

from longrl_jax.sharding.mesh import AXES, make_mesh
from longrl_jax.sharding.ring_attention import dense_attention
from longrl_jax.sharding.rules import RULES, constrain, num_parts, spec
from longrl_jax.sharding.sequence import attend

__all__ = [
    "AXES",
    "RULES",
    "attend",
    "constrain",
    "dense_attention",
    "make_mesh",
    "num_parts",
    "spec",
]
