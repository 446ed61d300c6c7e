"""Ring, Ulysses and both at once give the attention of one device: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import compare, make_case, random_row, value_and_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrl_jax.sharding import attend, dense_attention, make_mesh, ulysses_size

NUM_DEVICES = 8
BFLOAT16_RATIO = 2.0  # a ring rounds once more a block, and gradients of repeated heads are added
QWEN_HEADS = {"7B": (28, 4), "3B": (16, 2), "1.5B": (12, 2)}


def on_mesh(seq, arrays, ids, **options):
    assert jax.device_count() == NUM_DEVICES
    with jax.set_mesh(make_mesh(seq=seq, devices=jax.devices()[:seq])):
        return value_and_gradients(lambda *a: attend(*a, block_size=16, **options), arrays, ids)


def cases():
    """Every kind on 1, 2, 4 and 8 devices with every head layout; the quick run takes a few."""
    quick = {
        ("ulysses", 0, 8, "3B"),
        ("2d", 4, 8, "7B"),
        ("2d", 2, 8, "1.5B"),
        ("ring", 0, 8, "7B"),
    }
    quick |= {("ulysses", 0, 4, "1.5B"), ("2d", 0, 4, "3B"), ("ulysses", 0, 1, "7B")}
    quick |= {("2d", 0, 2, "1.5B"), ("2d", 0, 1, "3B"), ("ulysses", 0, 2, "3B")}
    for size, (N, _) in QWEN_HEADS.items():
        for seq in (1, 2, 4, 8):
            both = [("2d", u) for u in (0, 2, 4) if seq % max(u, 1) == 0 and u < seq]
            for kind, ulysses in [("ring", 0), ("ulysses", 0), *both]:
                if kind != "ulysses" or N % seq == 0:
                    case = kind, ulysses, seq, size
                    yield pytest.param(*case, marks=[] if case in quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "ulysses", "seq", "size"), cases())
def test_every_kind_equals_dense(kind, ulysses, seq, size):
    """Packed group rows of uneven branches, shuffled, with padding."""
    N, K = QWEN_HEADS[size]
    arrays, ids = make_case(seq, B=2, T=96, N=N, K=K, H=8)
    got = on_mesh(seq, arrays, ids, kind=kind, ulysses=ulysses)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


@pytest.mark.parametrize("kind", ["ulysses", "2d"])
def test_heads_may_be_split_over_tensor_too(kind):
    arrays, ids = make_case(9, B=2, T=96)
    with jax.set_mesh(
        make_mesh(seq=4, tensor=2) if kind == "2d" else make_mesh(fsdp=2, seq=2, tensor=2)
    ):
        got = value_and_gradients(lambda *a: attend(*a, kind=kind, block_size=16), arrays, ids)
    compare(got, value_and_gradients(dense_attention, arrays, ids))


@pytest.mark.parametrize(("kind", "ulysses"), [("ring", 0), ("ulysses", 0), ("2d", 2)])
def test_bfloat16_is_as_exact_as_bfloat16_can_be(kind, ulysses):
    """Its distance from the float32 result is that of dense attention in bfloat16."""
    arrays, ids = make_case(11, B=2, T=96, N=16, K=2)
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    exact = value_and_gradients(dense_attention, [x.astype(np.float32) for x in narrow], ids)
    dense = value_and_gradients(dense_attention, narrow, ids)
    got = on_mesh(8, narrow, ids, kind=kind, ulysses=ulysses)
    for name, x, by_dense, want in zip(("value", "dq", "dk", "dv"), got, dense, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        error, error_of_dense = (
            np.linalg.norm(np.asarray(y, np.float32) - want) for y in (x, by_dense)
        )
        assert error <= BFLOAT16_RATIO * error_of_dense, name


def check_any_shape_and_any_order(data):
    """Lengths that fill no block, any segments, orders that no rule of ours would make."""
    split = data.draw(
        st.sampled_from([("ring", 8, 0), ("2d", 8, 2), ("2d", 4, 2), ("ulysses", 4, 0)])
    )
    kind, seq, ulysses = split
    K = data.draw(st.sampled_from([1, 2, 3]), "K")
    N = K * 4 * data.draw(st.sampled_from([1, 2]), "groups")
    T = seq * data.draw(st.integers(3, 30), "tokens of a device")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    if data.draw(st.booleans(), "group rows"):
        rows = [random_row(rng, T, num_segments=1, num_padding=int(rng.integers(4))) for _ in "ab"]
        ids = np.stack(rows, axis=1)
    else:  # anything at all
        highest = [[[T]], [[rng.integers(1, 5)]], [[rng.integers(1, 5)]]]
        ids = rng.integers(0, highest, (3, 2, T)).astype(np.int32)
    arrays = [rng.normal(size=(2, T, n, 8)).astype(np.float32) for n in (N, K, K, N)]
    block_size = data.draw(st.sampled_from([5, 16, 64]), "block_size")
    mesh = make_mesh(seq=seq, devices=jax.devices()[:seq])
    with jax.set_mesh(mesh):
        got = value_and_gradients(
            lambda *a: attend(*a, kind=kind, ulysses=ulysses, block_size=block_size), arrays, ids
        )
    compare(got, value_and_gradients(dense_attention, arrays, ids))


OPTIONS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=3, **OPTIONS)
@given(data=st.data())
def test_any_shape_and_any_order(data):
    check_any_shape_and_any_order(data)


@pytest.mark.slow
@settings(max_examples=30, **OPTIONS)
@given(data=st.data())
def test_many_shapes_and_orders(data):
    check_any_shape_and_any_order(data)


@pytest.mark.parametrize(("K", "sent"), [(4, 4), (2, 4), (1, 4), (6, 12)])
def test_key_heads_are_repeated_only_as_far_as_needed(K, sent):
    """Four devices need a number of heads that four divides."""
    arrays, ids = make_case(1, B=1, T=16, N=12, K=K, H=4)
    with jax.set_mesh(make_mesh(seq=4, devices=jax.devices()[:4])):
        program = jax.make_jaxpr(lambda q, k, v: attend(q, k, v, *ids, kind="ulysses"))
        text = str(program(*arrays[:3]))
    exchanged = [line for line in text.splitlines() if "all_to_all[" in line]
    there = [line.split("=")[0].split(":")[1].split("{")[0].strip() for line in exchanged]
    assert there == ["f32[1,16,3,4]", *[f"f32[1,16,{sent // 4},4]"] * 2, "f32[1,4,12,4]"]


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (
            28,
            {"kind": "ulysses", "seq": 8},
            "kind 'ulysses' cannot share 28 query heads and the 8 devices of mesh axis seq; these "
            "can: 'ring', '2d' with ulysses=2 (in a ring of 4), '2d' with ulysses=4 (in a ring "
            "of 2)",
        ),
        (
            28,
            {"kind": "2d", "ulysses": 8, "seq": 8},
            "kind '2d' with ulysses=8 cannot share 28 query heads and the 8 devices",
        ),
        (
            16,
            {"kind": "2d", "ulysses": 3, "seq": 8},
            "these can: 'ring', '2d' with ulysses=2 (in a ring of 4), '2d' with ulysses=4 (in a "
            "ring of 2), 'ulysses'",
        ),
        (
            28,
            {"kind": "ulysses", "seq": 4, "tensor": 2},
            "28 query heads over tensor=2 and the 4 devices of mesh axis seq; these can: 'ring', "
            "'2d' with ulysses=2 (in a ring of 2)",
        ),
        (7, {"kind": "2d", "seq": 2}, "kind '2d' cannot share 7 query heads and the 2 devices"),
        (16, {"kind": "ring", "ulysses": 2, "seq": 4}, "ulysses=2 is for kind '2d'"),
    ],
)  # fmt: skip
def test_a_bad_combination_is_refused_with_the_good_ones(heads, options, message):
    with pytest.raises(ValueError) as error:
        ulysses_size(heads, **options)
    assert message in str(error.value)


def test_as_many_neighbours_as_the_heads_allow():
    assert [ulysses_size(N, kind="2d", seq=8) for N in (28, 16, 12, 6)] == [4, 8, 4, 2]
    assert ulysses_size(28, kind="2d", seq=4, tensor=2) == 2
    assert ulysses_size(7, kind="2d", seq=1) == ulysses_size(7, kind="ulysses", seq=1) == 1


def test_attend_refuses_what_the_heads_do_not_allow():
    (q, k, v, _), ids = make_case(7, B=1, T=32, N=28, K=4, H=4)
    with (
        jax.set_mesh(make_mesh(seq=8)),
        pytest.raises(ValueError, match="28 query heads and the 8"),
    ):
        attend(q, k, v, *ids, kind="ulysses")
