"""The one table from logical dims to mesh axes."""

import math

import jax
from jax.sharding import PartitionSpec

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows
    "tokens": ("seq",),  # of a row
    "frames": ("data", "fsdp", "seq"),  # of one video, while it is encoded
    "embed": ("fsdp", "seq"),  # of a weight; activations keep their width whole
    "rank": ("fsdp", "seq"),  # of an adapter's matrix that has no "embed" (models/lora.py)
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def spec(*dims: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical dims (None: not split)."""
    axes = [() if dim is None else _axes(dim) for dim in dims]
    flat = [axis for group in axes for axis in group]
    if len(set(flat)) != len(flat):
        raise ValueError(f"dims {dims} use one mesh axis twice: {axes}; change RULES or a dim")
    return PartitionSpec(*(group[0] if len(group) == 1 else group or None for group in axes))


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Places x as its logical dims say; does nothing outside jax.set_mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*dims))


def num_parts(dim: str) -> int:
    """Returns how many parts the mesh of jax.set_mesh splits a dim into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _axes(dim))


def _axes(dim: str) -> tuple[str, ...]:
    if dim not in RULES:
        raise ValueError(f"logical dim {dim!r} is unknown; choose one of {', '.join(RULES)}")
    return RULES[dim]
