"""Projectors against the torch twin, and packing against drawings."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import VISION_WIDTH, WIDTH, Pack, make_projector

from longrl_jax.models import projector, weights

ATOL = 2e-5  # float32 sums of up to 288 products, in another order
KINDS = {  # kind -> index of each parametrized layer in torch's sequence ("" for a lone one)
    "linear": [""],
    "mlp2x_gelu": ["0", "2"],
    "mlp3x_gelu": ["0", "2", "4"],
    "mlp_downsample": ["1", "2", "4"],
    "mlp_downsample_2x2_fix": ["1", "2", "4"],
    "mlp_downsample_3x3_fix": ["1", "2", "4", "5", "7"],
    "mlp_downsample_3x3_s2": ["1", "2", "4", "5", "7", "8", "10", "11", "13"],
    "mlp_downsample_3x3_s2_new": ["1", "2", "4", "5", "7", "8", "10", "11", "13", "14", "16"],
}
GRID_4 = np.arange(16.0).reshape(1, 16, 1)
GRID_3 = np.arange(1.0, 10.0).reshape(1, 9, 1)
O = 0.0  # a cell outside the grid


def ours_of(kind: str, C: int, D: int, state) -> projector.Projector:
    cfg = projector.Config(kind=kind, width_in=C, width_out=D)
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: nnx.Dict(projector=projector.Projector(cfg, rngs=nnx.Rngs(0))))
    )
    arrays = dict(weights.from_hf(abstract, projector.table(cfg, hf=""), state))
    arrays = {path: jnp.asarray(x) for path, x in arrays.items()}
    return nnx.merge(graphdef, weights.with_arrays(abstract, arrays))["projector"]


@pytest.mark.parametrize("grid", [4, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_projector_equals_its_torch_twin(rng, kind, grid):
    twin = make_projector(kind)
    state = {name: x.detach().numpy() for name, x in twin.state_dict().items()}
    ours = ours_of(kind, VISION_WIDTH, WIDTH, state)
    x = rng.standard_normal((2, grid**2, VISION_WIDTH)).astype(np.float32)
    with torch.no_grad():
        want = twin(torch.tensor(x)).numpy()
    got = ours(projector.pack(jnp.asarray(x), grid=grid, size=projector.pack_size(kind)))
    np.testing.assert_allclose(got, want, atol=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_names_are_those_of_the_sequence(kind):
    cfg = projector.Config(kind=kind, width_in=VISION_WIDTH, width_out=WIDTH)
    got = {row.hf for row in projector.table(cfg, hf="x/").values()}
    layers = ["layers" + (f".{index}" if index else "") for index in KINDS[kind]]
    assert got == {f"x/{layer}.{end}" for layer in layers for end in ("weight", "bias")}


def test_identity_hands_the_states_on(rng):
    ours = ours_of("identity", 8, 8, {})
    x = jnp.asarray(rng.standard_normal((1, 4, 8)), jnp.float32)
    np.testing.assert_array_equal(ours(projector.pack(x, grid=2, size=1)), x)


def test_identity_refuses_another_width():
    with pytest.raises(ValueError, match="width 8 to a model of width 16"):
        projector.steps(projector.Config(kind="identity", width_in=8, width_out=16))


@pytest.mark.parametrize(
    ("x", "size", "want"),
    [
        (GRID_4, 2, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        (
            GRID_4,
            3,
            [
                [0, 1, 2, 4, 5, 6, 8, 9, 10],
                [3, O, O, 7, O, O, 11, O, O],
                [12, 13, 14, O, O, O, O, O, O],
                [15, O, O, O, O, O, O, O, O],
            ],
        ),
        (GRID_3, 2, [[1, 2, 4, 5], [3, O, 6, O], [7, 8, O, O], [9, O, O, O]]),
        (GRID_3, 3, [[1, 2, 3, 4, 5, 6, 7, 8, 9]]),
        (GRID_3, 1, [[1], [2], [3], [4], [5], [6], [7], [8], [9]]),
    ],
    ids=["4-2x2", "4-3x3", "3-2x2", "3-3x3", "3-1x1"],
)
def test_packing_equals_the_drawing(x, size, want):
    got = projector.pack(jnp.asarray(x), grid=round(x.shape[1] ** 0.5), size=size)
    np.testing.assert_array_equal(got[0], want)


def test_channels_of_a_patch_stay_together():
    x = np.stack([np.arange(16.0), 100 + np.arange(16.0)], axis=-1)[None]
    got = projector.pack(jnp.asarray(x), grid=4, size=2)
    np.testing.assert_array_equal(got[0, 0], [0, 100, 1, 101, 4, 104, 5, 105])


@pytest.mark.parametrize("size", [2, 3])
def test_packing_equals_the_loop_over_cells(rng, size):
    x = rng.standard_normal((3, 49, 5)).astype(np.float32)
    want = Pack(size)(torch.tensor(x)).numpy()
    np.testing.assert_array_equal(projector.pack(jnp.asarray(x), grid=7, size=size), want)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "kind", "tokens"),
    [(448, 14, "mlp_downsample_2x2_fix", 256), (448, 14, "mlp_downsample_3x3_fix", 121)],
)
def test_tokens_of_a_frame_are_the_published_ones(image_size, patch_size, kind, tokens):
    side = projector.packed_side(image_size // patch_size, projector.pack_size(kind))
    assert side**2 == tokens


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp_gelu", "resampler", ""])
def test_an_unknown_kind_lists_the_known(kind):
    with pytest.raises(ValueError, match=f"'{kind}' is unknown; we know identity, linear"):
        projector.pack_size(kind)
