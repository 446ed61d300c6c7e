"""The device mesh: four axes that every array of the library is placed on."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    seq: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """Returns a mesh of all devices (or of those given); the fastest links go to the last axes.

    data: copies of the model. fsdp: parameters and rows are split. seq: one row's tokens are
    split. tensor: heads and MLP width are split.
    """
    shape = (data, fsdp, seq, tensor)
    count = jax.device_count() if devices is None else len(devices)
    if math.prod(shape) != count:
        named = " * ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh {named} needs {math.prod(shape)} devices, but there are {count}; "
            "change mesh.*, or simulate devices with mesh.simulated=true"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def to_local(x: jax.Array) -> jax.Array:
    """Returns x on this process's part of its mesh (mesh.local_mesh), split over the same axes.

    Where a mesh is of one process that is x itself. Otherwise all processes must call it: x is
    whole on every device for a moment.
    """
    assert isinstance(x.sharding, NamedSharding), f"{x.sharding} has no mesh"
    mesh = x.sharding.mesh
    local = mesh.local_mesh
    if local.size == mesh.size:
        return x
    parts = [shard.data for shard in _replicate(mesh)(x).addressable_shards]
    everywhere = NamedSharding(local, PartitionSpec())
    whole = jax.make_array_from_single_device_arrays(x.shape, everywhere, parts)
    return jax.device_put(whole, NamedSharding(local, x.sharding.spec))


@functools.cache
def _replicate(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
