"""The counter: FLOPs, tiles and bytes against formulas and loops written down here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longrl_jax.plan import counter
from longrl_jax.sharding import attend, make_mesh

XLA_RTOL = 0.01  # XLA counts elementwise operations too: 1 in 2 * 256 of a product's
L, B, D = 5, 24, 16


def count(function, *args, num_devices=1, tile_share=1.0):
    jaxpr = jax.jit(function).trace(*args).jaxpr
    return counter.work(jaxpr, num_devices=num_devices, tile_share=tile_share)


def layers(x, w):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jax.lax.scan(body, x, w)[0]


def test_a_loop_counts_as_often_as_it_runs_and_recomputing_counts():
    x, w = jnp.ones((B, D)), jnp.ones((L, D, D))
    product = 2 * B * D * D
    assert count(layers, x, w).flops == L * product
    gradient = jax.grad(lambda w: layers(x, w).sum())
    assert count(gradient, w).flops == L * 4 * product  # forward, again, and two products backward


def test_a_loop_of_unknown_length_is_named():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    work = count(run, jnp.ones((D, D)))
    assert work.unknown_loops == 1 and work.flops == 2 * D**3


def test_a_conditional_counts_its_dearest_branch_and_a_tile_its_share():
    x = jnp.ones((D, D))

    def either(x, once, twice):
        return jax.lax.cond(x[0, 0] > 0, once, twice, x)

    one, two = (lambda x: x @ x), (lambda x: x @ x @ x)
    assert count(lambda x: either(x, one, two), x, tile_share=0.25).dense == 2 * 2 * D**3
    tile = count(lambda x: either(x, one, lambda x: x), x, tile_share=0.25)
    assert (tile.dense, tile.tiles, tile.decisions) == (0, 0.25 * 2 * D**3, 1)


def test_a_pass_that_may_be_empty_is_no_tile():
    """Its products outside tiles stay what they are; its tiles are counted once by their share."""

    def tile(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    def whole_pass(x):
        return tile(x) @ x

    def maybe(x):
        return jax.lax.cond(x.any(), whole_pass, jnp.zeros_like, x)

    x = jnp.zeros((4, 4))
    assert count(maybe, x, tile_share=0.5) == count(whole_pass, x, tile_share=0.5)
    assert count(maybe, x, tile_share=0.5).dense == 2 * 4**3


def test_shapes_are_everyones_outside_shard_map_and_one_devices_inside():
    mesh = make_mesh(seq=8)
    x, w = jnp.ones((8 * B, D)), jnp.ones((D, D))
    rows = PartitionSpec("seq")

    def run(x, w):
        y = jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, in_specs=rows, out_specs=rows)(x)
        return y @ w

    inside, outside = 2 * 2 * B * B * D, 2 * 8 * B * D * D
    assert count(run, x, w, num_devices=8).flops == inside + outside / 8


def test_a_convolution_is_a_product_with_its_taps():
    frames, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))

    def run(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count(run, frames, kernel).flops == 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)


@pytest.mark.parametrize("seq", [1, 4])
def test_attention_is_two_products_a_tile_forward_and_five_backward(seq):
    T, N, K, H, block = 64, 4, 2, 8, 16
    q, kv = jnp.ones((1, T, N, H)), jnp.ones((1, T, K, H))
    order, ones = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)

    def forward(q, k, v):
        return attend(q, k, v, order, 0 * ones, ones, block_size=block).sum()

    tiles, product = (T // block) ** 2, 2 * block * block * N * H
    with jax.set_mesh(make_mesh(seq=seq, devices=jax.devices()[:seq])):
        once = count(forward, q, kv, kv, num_devices=seq, tile_share=0.5)
        both = count(jax.grad(forward, (0, 1, 2)), q, kv, kv, num_devices=seq, tile_share=0.5)
    assert once.tiles == 0.5 * 2 * product * tiles / seq and once.decisions == tiles / seq
    assert both.tiles == 0.5 * 7 * product * tiles / seq and both.decisions == 2 * tiles / seq
    assert both.dense == 0


def test_an_unrolled_model_has_the_flops_that_xla_says():
    x, w = jnp.ones((64, 256)), jnp.ones((3, 256, 256))

    def loss(w):
        y = x
        for i in range(3):
            y = jnp.tanh(y @ w[i])
        return y.sum()

    traced = jax.jit(jax.grad(loss)).trace(w)
    said = traced.lower().compile().cost_analysis()["flops"]
    assert counter.work(traced.jaxpr, num_devices=1).flops == pytest.approx(said, rel=XLA_RTOL)


def test_what_is_sent_counts_loops_and_groups():
    mesh = make_mesh(data=2, seq=4)
    rows = PartitionSpec(("data", "seq"))
    x = jax.ShapeDtypeStruct((8 * B, D), jnp.float32, sharding=NamedSharding(mesh, rows))

    def local(x):
        def body(x, _):
            x = jax.lax.ppermute(x, "seq", [(i, (i + 1) % 4) for i in range(4)])
            whole = jax.lax.all_gather(x, "seq")
            return x + jnp.sin(whole).sum(0) + jax.lax.psum(jnp.cos(x), ("data", "seq")), None

        return jax.lax.scan(body, x, None, L)[0]

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    sent = counter.link_bytes(run.trace(x).lower().compile().as_text())
    part = B * D * 4
    assert sent["collective-permute"] == L * part
    assert sent["all-gather"] == L * part * 3  # of 4 parts it has one itself
    assert sent["all-reduce"] == L * 2 * part * 7 / 8


def test_lines_of_a_gpu_program_are_understood():
    text = """
%body (p: f32[4]) -> f32[4] {
  %g = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%a), replica_groups=mesh['y'=8] {'y'}
  %rs = (f32[32]{0}, f32[4]{0}) reduce-scatter-start(%b), replica_groups=[2,8]<=[16]
  %cp = (bf16[6]{0}, bf16[6]{0}, u32[], u32[]) collective-permute-start(%c), pairs={{0,1}}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all = f32[10]{0} all-reduce-start(%d), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""
    sent = counter.link_bytes(text)
    assert sent["all-gather"] == 3 * 32 * 8 * 2 * 7 / 8
    assert sent["reduce-scatter"] == 3 * 32 * 4 * 7 / 8
    assert sent["collective-permute"] == 3 * 6 * 2
    assert sent["all-reduce"] == 2 * 40 / 2
