"""Logical dims, mesh axes and meshes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from longrl_jax.sharding import constrain, make_mesh, num_parts, spec


def test_spec_reads_the_table():
    assert spec("batch", "tokens", None) == P(("data", "fsdp"), "seq", None)
    assert spec("embed", "mlp") == P(("fsdp", "seq"), "tensor")


def test_one_mesh_axis_is_not_used_twice():
    with pytest.raises(ValueError, match="twice"):
        spec("embed", "tokens")


def test_an_unknown_dim_lists_the_known():
    with pytest.raises(ValueError, match="'token' is unknown.*tokens"):
        spec("token")


def test_constrain_places_only_under_a_mesh():
    x = jnp.zeros((4, 6))
    assert constrain(x, "batch", "tokens") is x
    with jax.set_mesh(make_mesh(data=2, fsdp=2, seq=2)):
        placed = jax.jit(lambda x: constrain(x, "batch", "tokens"))(x)
        assert num_parts("batch") == 4
    assert placed.sharding.spec == P(("data", "fsdp"), "seq")
    assert num_parts("batch") == 1


def test_a_mesh_must_use_all_devices_or_those_given():
    with pytest.raises(ValueError, match=r"seq=3 .* needs 3 devices, but there are 8"):
        make_mesh(seq=3)
    assert make_mesh(seq=3, devices=jax.devices()[:3]).shape["seq"] == 3
