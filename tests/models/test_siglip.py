"""The SigLIP tower against `transformers`, block by block, under both spellings of its names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import VISION_WIDTH, make_siglip, randomize

from longrl_jax.models import siglip, weights
from longrl_jax.sharding import make_mesh

ATOL = 2e-5  # float32 sums of up to 192 products, in another order; states are of order 1 to 10
F, SIZE, PATCH, NUM_LAYERS = 8, 32, 8, 3


def ours_of(torch_model, *, names: str = "") -> tuple[siglip.Config, siglip.Tower]:
    """Our tower with the numbers of theirs; `names` stands before every tensor name."""
    cfg = siglip.parse_config(torch_model.config.to_dict(), where="test")
    # the part is called "vision" in a model, and in the paths of the table
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: nnx.Dict(vision=siglip.Tower(cfg, rngs=nnx.Rngs(0))))
    )
    state = {names + name: x.detach().numpy() for name, x in torch_model.state_dict().items()}
    unused = tuple(f"{names}{name}*" for name in siglip.UNUSED)
    rows = siglip.table(cfg, hf=names)
    arrays = dict(weights.from_hf(abstract, rows, state, ignored=unused))
    arrays = {path: jnp.asarray(x) for path, x in arrays.items()}
    return cfg, nnx.merge(graphdef, weights.with_arrays(abstract, arrays))["vision"]


@pytest.fixture(scope="module")
def pair():
    """(torch tower, our tower)."""
    torch_model = make_siglip(image_size=SIZE, num_layers=NUM_LAYERS)
    return torch_model, ours_of(torch_model)[1]


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.uniform(-1, 1, (F, SIZE, SIZE, 3)).astype(np.float32)


def their_states(torch_model, pixels) -> list[np.ndarray]:
    """hidden_states of transformers: entry i follows i layers; the last is before the norm."""
    with torch.no_grad():
        out = torch_model(
            torch.tensor(pixels).permute(0, 3, 1, 2).contiguous(), output_hidden_states=True
        )
    return [x.numpy() for x in (*out.hidden_states, out.last_hidden_state)]


def layer_at(tower, i):
    graphdef, state = nnx.split(tower.layers)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state))


def test_patches_and_positions_equal_transformers(pair, pixels):
    torch_model, tower = pair
    np.testing.assert_allclose(
        tower.embed(jnp.asarray(pixels)), their_states(torch_model, pixels)[0], atol=ATOL
    )


@pytest.mark.parametrize("index", range(NUM_LAYERS))
def test_layer_equals_transformers(pair, rng, index):
    torch_model, tower = pair
    x = rng.standard_normal((F, 16, VISION_WIDTH)).astype(np.float32)
    with torch.no_grad():
        want = torch_model.encoder.layers[index](torch.tensor(x), attention_mask=None).numpy()
    np.testing.assert_allclose(layer_at(tower, index)(jnp.asarray(x)), want, atol=ATOL)


@pytest.mark.parametrize("num_layers", range(1, NUM_LAYERS + 1))
def test_hidden_state_equals_transformers(pair, pixels, num_layers):
    torch_model, tower = pair
    got = tower(jnp.asarray(pixels), num_layers=num_layers)
    np.testing.assert_allclose(got, their_states(torch_model, pixels)[num_layers], atol=ATOL)


def test_the_whole_tower_ends_in_the_norm(pair, pixels):
    torch_model, tower = pair
    want = their_states(torch_model, pixels)[-1]
    np.testing.assert_allclose(tower(jnp.asarray(pixels)), want, atol=ATOL)


@pytest.mark.parametrize("names", ["", siglip.PUBLISHED_PREFIX])
def test_both_spellings_of_the_names_give_the_same_tower(pair, pixels, names):
    torch_model, tower = pair
    again = ours_of(torch_model, names=names)[1]
    np.testing.assert_array_equal(again.embed(pixels), tower.embed(pixels))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(tower))


def test_a_border_that_fits_no_patch_is_left_out_as_in_transformers(rng):
    """30 px in patches of 8: 3 x 3 patches, 6 px to spare."""
    torch_model = make_siglip(image_size=30, num_layers=1)
    cfg, tower = ours_of(torch_model)
    assert cfg.grid == 3
    pixels = rng.uniform(-1, 1, (2, 30, 30, 3)).astype(np.float32)
    want = their_states(torch_model, pixels)[1]
    np.testing.assert_allclose(tower(jnp.asarray(pixels), num_layers=1), want, atol=ATOL)


@pytest.mark.parametrize("shape", [{"fsdp": 2, "seq": 2, "tensor": 2}, {"seq": 8}], ids=str)
def test_mesh_does_not_change_states(pair, pixels, shape):
    _, tower = pair
    graphdef, state = nnx.split(tower)
    want = tower(jnp.asarray(pixels), num_layers=2)
    with jax.set_mesh(make_mesh(**shape)):
        got = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x, num_layers=2))(state, pixels)
    np.testing.assert_allclose(got, want, atol=ATOL)
    assert got.sharding.spec[0] is not None  # frames are split, not copied


def test_bfloat16_pixels_give_bfloat16_states(pair, pixels):
    _, tower = pair
    got = tower(jnp.asarray(pixels, jnp.bfloat16), num_layers=2)
    want = tower(jnp.asarray(pixels), num_layers=2)
    assert got.dtype == jnp.bfloat16
    # 8 bits of mantissa, a few dozen roundings that partly cancel
    assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 0.03


def test_frames_of_another_size_are_refused(pair):
    _, tower = pair
    with pytest.raises(ValueError, match="32 px squares"):
        tower(jnp.zeros((1, 48, 48, 3)))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "clip_vision_model", "clip_vision_model"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("num_channels", 1, "num_channels=1"),
        ("num_attention_heads", 5, "num_attention_heads=5"),
        ("patch_size", 0, "patch_size=0"),
        ("hidden_size", None, "hidden_size=None"),
    ],
)
def test_a_config_we_cannot_follow_is_refused(pair, field, value, named):
    tree = pair[0].config.to_dict() | {field: value}
    with pytest.raises(ValueError, match=named):
        siglip.parse_config(tree, where="here")


def test_the_activation_is_the_one_of_the_config():
    """With weights this large the two GELUs differ by more than the tolerance."""
    torch_model = randomize(make_siglip(num_layers=1), seed=3, scale=1.0)
    _, tower = ours_of(torch_model)
    x = np.random.default_rng(0).standard_normal((1, 16, VISION_WIDTH)).astype(np.float32)
    with torch.no_grad():
        want = torch_model.encoder.layers[0](torch.tensor(x), attention_mask=None).numpy()
    got = layer_at(tower, 0)(jnp.asarray(x))
    np.testing.assert_allclose(got, want, atol=ATOL * np.abs(want).max())
