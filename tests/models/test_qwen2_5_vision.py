"""Qwen2.5-VL's tower and merger against `transformers`, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_qwen2_5_vl import VISION, make_tower, their_patches
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from longrl_jax.models import qwen2_5_vision as vision
from longrl_jax.models import weights
from longrl_jax.sharding import make_mesh

ATOL = 2e-5  # float32 sums of up to 192 products, in another order; states are of order 1 to 10
WIDTH, HEADS, PATCH = VISION["hidden_size"], VISION["num_heads"], VISION["patch_size"]
GRIDS = {
    "one token": (2, 2),
    "one window": (4, 4),
    "whole windows": (8, 12),
    "windows cut below and right": (6, 10),
    "narrower than a window": (12, 2),
}
"""Patches of a unit, rows and columns; a window has 4 x 4."""
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def ours_of(torch_tower) -> tuple[vision.Config, vision.Tower, vision.Merger]:
    cfg = vision.parse_config(torch_tower.config.to_dict(), where="test")
    make = lambda: nnx.Dict(  # noqa: E731
        vision=vision.Tower(cfg, rngs=nnx.Rngs(0)), projector=vision.Merger(cfg, rngs=nnx.Rngs(0))
    )
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    state = {name: x.detach().numpy() for name, x in torch_tower.state_dict().items()}
    arrays = dict(weights.from_hf(abstract, vision.table(cfg, hf=""), state))
    arrays = {path: jnp.asarray(x) for path, x in arrays.items()}
    both = nnx.merge(graphdef, weights.with_arrays(abstract, arrays))
    return cfg, both["vision"], both["projector"]


@pytest.fixture(scope="module")
def trio():
    """(torch tower, our tower, our merger)."""
    torch_tower = make_tower()
    return torch_tower, *ours_of(torch_tower)[1:]


def pixels_of(grid, rng, num_frames=4) -> np.ndarray:
    y, x = grid
    return rng.uniform(-2, 2, (num_frames, y * PATCH, x * PATCH, 3)).astype(np.float32)


class Order:
    """Their order of patches (window, token, patch of the token) against our rows."""

    def __init__(self, grid, num_units):
        y, x = grid
        self.grid, self.num_units = grid, num_units
        thw = torch.tensor([[num_units, y, x]])
        self.window_index, self.window_ends = get_vision_window_index(thw, 2, 16, PATCH)
        self.positions = get_vision_position_ids(thw, 2).numpy()
        self.unit_ends = torch.arange(num_units + 1) * y * x

    def ours(self, theirs: torch.Tensor) -> np.ndarray:
        """[patches, C], token by token but not by window -> [U, y, x, C]."""
        out = np.empty((self.num_units, *self.grid, theirs.shape[-1]), np.float32)
        unit = np.repeat(np.arange(self.num_units), self.grid[0] * self.grid[1])
        out[unit, self.positions[:, 0], self.positions[:, 1]] = theirs.numpy()
        return out

    def by_token(self, ours: np.ndarray) -> torch.Tensor:
        """Undoes `ours`."""
        unit = np.repeat(np.arange(self.num_units), self.grid[0] * self.grid[1])
        return torch.tensor(ours[unit, self.positions[:, 0], self.positions[:, 1]])

    def by_window(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 4, x.shape[-1])[self.window_index].reshape(x.shape)

    def from_window(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 4, x.shape[-1])[torch.argsort(self.window_index)].reshape(x.shape)


def layer_at(tower, i):
    graphdef, state = nnx.split(tower.layers)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state))


@every_grid
def test_patches_equal_transformers(trio, rng, grid):
    torch_tower, tower, _ = trio
    pixels = pixels_of(grid, rng)
    rows, _ = their_patches(pixels)
    with torch.no_grad():
        want = Order(grid, 2).ours(torch_tower.patch_embed(rows))
    np.testing.assert_allclose(tower.embed(jnp.asarray(pixels)), want, atol=ATOL)


@pytest.mark.parametrize("grid", [(4, 4), (6, 10)], ids=["one window", "cut windows"])
@pytest.mark.parametrize("index", range(VISION["depth"]))
def test_layer_equals_transformers(trio, rng, grid, index):
    """Layers 1 and 3 see the whole unit, 0 and 2 their windows."""
    torch_tower, tower, _ = trio
    order = Order(grid, 3)
    x = rng.standard_normal((3, *grid, WIDTH)).astype(np.float32)
    full = index in VISION["fullatt_block_indexes"]
    with torch.no_grad():
        angles = torch_tower.rotary_pos_emb(torch.tensor(x), torch.tensor(order.positions))
        out = torch_tower.blocks[index](
            order.by_window(order.by_token(x)),
            cu_seqlens=order.unit_ends if full else order.window_ends,
            position_embeddings=tuple(order.by_window(angle) for angle in angles),
        )
    want = order.ours(order.from_window(out))
    got = layer_at(tower, index)(jnp.asarray(x), full=jnp.asarray(full))
    np.testing.assert_allclose(got, want, atol=ATOL)


def test_merger_equals_transformers(trio, rng):
    torch_tower, _, merger = trio
    order = Order((6, 10), 2)
    x = rng.standard_normal((2, 6, 10, WIDTH)).astype(np.float32)
    with torch.no_grad():
        want = torch_tower.merger(order.by_token(x)).numpy()
    got = merger(vision.pack(jnp.asarray(x), merge=2))
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=ATOL)


@every_grid
def test_tower_and_merger_equal_transformers(trio, rng, grid):
    torch_tower, tower, merger = trio
    pixels = pixels_of(grid, rng, num_frames=6)
    with torch.no_grad():
        want = torch_tower(*their_patches(pixels)).pooler_output.numpy()
    got = merger(vision.pack(tower(jnp.asarray(pixels)), merge=2))
    assert got.shape == (3, grid[0] * grid[1] // 4, VISION["out_hidden_size"])
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=ATOL)


@pytest.mark.parametrize("full", [(), (0, 1, 2, 3)], ids=["windows only", "whole only"])
def test_the_config_says_which_layers_see_the_whole_unit(rng, full):
    torch_tower = make_tower(fullatt_block_indexes=list(full))
    _, tower, merger = ours_of(torch_tower)
    pixels = pixels_of((6, 10), rng)
    with torch.no_grad():
        want = torch_tower(*their_patches(pixels)).pooler_output.numpy()
    got = merger(vision.pack(tower(jnp.asarray(pixels)), merge=2))
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=ATOL)


def test_units_do_not_see_each_other(trio, rng):
    """So a long film may be encoded in chunks of whole units."""
    _, tower, _ = trio
    pixels = pixels_of((6, 10), rng, num_frames=8)
    whole = tower(jnp.asarray(pixels))
    parts = [tower(jnp.asarray(pixels[i : i + 2])) for i in range(0, 8, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=ATOL)


@pytest.mark.parametrize("shape", [{"fsdp": 2, "seq": 2, "tensor": 2}, {"seq": 8}], ids=str)
def test_mesh_does_not_change_states(trio, rng, shape):
    _, tower, _ = trio
    pixels = pixels_of((6, 10), rng, num_frames=16)
    graphdef, state = nnx.split(tower)
    want = tower(jnp.asarray(pixels))
    with jax.set_mesh(make_mesh(**shape)):
        got = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, pixels)
    np.testing.assert_allclose(got, want, atol=ATOL)
    assert got.sharding.spec[0] is not None  # units are split, not copied


def test_bfloat16_pixels_give_bfloat16_states(trio, rng):
    _, tower, _ = trio
    pixels = pixels_of((6, 10), rng)
    got = tower(jnp.asarray(pixels, jnp.bfloat16))
    want = tower(jnp.asarray(pixels))
    assert got.dtype == jnp.bfloat16
    # 8 bits of mantissa, a few dozen roundings that partly cancel
    assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 0.03


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 8), (2, 8, 20)])
def test_pixels_that_make_no_whole_tokens_are_refused(trio, shape):
    _, tower, _ = trio
    with pytest.raises(ValueError, match=f"{shape[0]} frames of {shape[1]} x {shape[2]} px do not"):
        tower(jnp.zeros((*shape, 3)))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("in_channels", 1, "in_channels=1"),
        ("num_heads", 5, "num_heads=5"),
        ("patch_size", 0, "patch_size=0"),
        ("hidden_size", None, "hidden_size=None"),
        ("window_size", 12, "window_size=12 px"),
        ("fullatt_block_indexes", [4], r"fullatt_block_indexes=\[4\]"),
        ("fullatt_block_indexes", 7, "fullatt_block_indexes=7"),
        ("tokens_per_second", 0, "tokens_per_second=0"),
    ],
)
def test_a_config_we_cannot_follow_is_refused(field, value, named):
    with pytest.raises(ValueError, match=named):
        vision.parse_config(VISION | {field: value}, where="here")
