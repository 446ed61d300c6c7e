"""The device mesh: four axes that every array of the library is placed on."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

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
