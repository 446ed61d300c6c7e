"""VILA put together: frames to logits and gradients equal a composition of torch modules."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny_models import VISION_WIDTH, WIDTH, write_vila

from longrl_jax import models
from longrl_jax.models import vila, weights
from longrl_jax.sharding import make_mesh

ATOL = 2e-5  # float32 sums of up to 288 products, in another order; embeddings are of order 1
LOGITS_ATOL = 1e-4  # through two more layers and the head; logits are of order 10
GRAD_RTOL = 1e-5  # of the largest gradient: the same sums, in another order
F, NEWLINE, PLACEHOLDER = 3, 10, 98
KINDS = {"mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 2}
"""Projector -> tokens along one side of a frame of 4 x 4 patches."""


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(torch parts, our config, our model, folder, projector kind)."""
    folder = tmp_path_factory.mktemp("vila") / "checkpoint"
    parts = write_vila(folder, kind=request.param)
    cfg, model = models.load(folder)
    return parts, cfg, model, folder, request.param


one_kind = pytest.mark.parametrize(
    "pair", ["mlp_downsample_2x2_fix"], indirect=True, scope="module"
)


@pytest.fixture
def frames(rng) -> np.ndarray:
    return rng.integers(0, 256, (F, 32, 32, 3), dtype=np.uint8)


def row_of(num_media: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, is_media) of: 5 words, then per frame its placeholders and "\\n", then 4 words."""
    frame = [PLACEHOLDER] * num_media + [NEWLINE]
    words = rng.integers(0, 90, 9).tolist()
    tokens = np.array(words[:5] + frame * F + words[5:], np.int32)
    return tokens, tokens == PLACEHOLDER


def aligned(features, is_media) -> jax.Array:
    """[F, n, C] rows -> [1, T, C] with garbage where no feature stands."""
    rows = np.asarray(features).reshape(-1, features.shape[-1])
    out = np.full((len(is_media), rows.shape[1]), np.nan, np.float32)
    out[is_media] = rows
    return jnp.asarray(out)[None]


def torch_states(parts, frames) -> torch.Tensor:
    """Published preprocessing and the tower's hidden state -2."""
    processor = transformers.SiglipImageProcessorPil(do_resize=False)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return parts["vision_tower"](pixels, output_hidden_states=True).hidden_states[-2]


def torch_embeddings(parts, frames, tokens) -> torch.Tensor:
    """Frame by frame: projector(state) and the embedding of "\\n", between the words."""
    embed = parts["llm"].get_input_embeddings()
    words = [t for t in tokens.tolist() if t not in (PLACEHOLDER, NEWLINE)]
    pieces = [embed(torch.tensor(words[:5]))]
    for features in parts["mm_projector"](torch_states(parts, frames)):
        pieces += [features, embed(torch.tensor([NEWLINE]))]
    return torch.cat([*pieces, embed(torch.tensor(words[5:]))])[None]


def ids_of(length):
    pos = jnp.arange(length, dtype=jnp.int32)[None]
    return pos, pos, jnp.zeros_like(pos), jnp.ones_like(pos)


def logits_of(model, x):
    return model.hidden(x, *ids_of(x.shape[1])) @ model.head()


@pytest.mark.parametrize("stage", vila.STAGES)
def test_stored_features_equal_torch(pair, frames, stage):
    parts, cfg, model, _, kind = pair
    states = torch_states(parts, frames)
    twin = parts["mm_projector"]
    if stage == "projected":
        with torch.no_grad():
            want = twin(states).numpy()
    else:  # what the twin does before its first layer with parameters
        want = twin.layers[0](states).numpy()
    got = model.encode(jnp.asarray(frames), stage=stage)
    np.testing.assert_allclose(got, want, atol=ATOL)
    assert got.shape == (F, KINDS[kind] ** 2, vila.feature_width(cfg, stage))


@pytest.mark.parametrize("stage", vila.STAGES)
def test_embeddings_and_logits_equal_torch(pair, frames, rng, stage):
    parts, _, model, _, kind = pair
    tokens, is_media = row_of(KINDS[kind] ** 2, rng)
    features = aligned(model.encode(jnp.asarray(frames), stage=stage), is_media)
    x = model.embed(jnp.asarray(tokens)[None], jnp.asarray(is_media)[None], features, stage=stage)
    with torch.no_grad():
        want = torch_embeddings(parts, frames, tokens)
        want_logits = parts["llm"](inputs_embeds=want).logits.numpy()
    np.testing.assert_allclose(x, want.numpy(), atol=ATOL)
    np.testing.assert_allclose(logits_of(model, x), want_logits, atol=LOGITS_ATOL)


@pytest.mark.parametrize("stage", vila.STAGES)
@one_kind
def test_gradients_equal_torch_and_stop_at_what_is_stored(pair, frames, rng, stage):
    parts, cfg, model, _, kind = pair
    tokens, is_media = row_of(KINDS[kind] ** 2, rng)
    cotangent = rng.standard_normal((1, len(tokens), 99)).astype(np.float32)
    features = aligned(model.encode(jnp.asarray(frames), stage=stage), is_media)
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def grad(state):
        model = nnx.merge(graphdef, state)
        x = model.embed(
            jnp.asarray(tokens)[None], jnp.asarray(is_media)[None], features, stage=stage
        )
        return (logits_of(model, x) * cotangent).sum()

    got = dict(weights.to_hf(grad(state), vila.table(cfg)))
    for part in parts.values():
        part.zero_grad()
    logits = parts["llm"](inputs_embeds=torch_embeddings(parts, frames, tokens)).logits
    (logits * torch.tensor(cotangent)).sum().backward()
    want = {
        f"{sub}/{name}": x.grad.numpy()
        for sub in ("llm", "mm_projector")
        for name, x in parts[sub].named_parameters()
    }
    scale = max(float(np.abs(x).max()) for x in want.values())
    trained = ("llm/", "mm_projector/") if stage == "packed" else ("llm/",)
    assert {n for n, x in got.items() if np.any(x)} == {n for n in want if n.startswith(trained)}
    for name in got:
        if name.startswith(trained):
            np.testing.assert_allclose(got[name], want[name], atol=GRAD_RTOL * scale, err_msg=name)


@one_kind
def test_the_token_that_ends_a_frame_follows_the_table(pair, frames, rng):
    _, _, model, _, _ = pair
    tokens, is_media = row_of(4, rng)
    features = aligned(model.encode(jnp.asarray(frames), stage="projected"), is_media)
    graphdef, state = nnx.split(model)
    moved = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    moved.text.table.set_value(model.text.table.get_value().at[NEWLINE].add(1.0))

    def embedded(m):
        args = jnp.asarray(tokens)[None], jnp.asarray(is_media)[None], features
        return m.embed(*args, stage="projected")[0]

    difference = np.asarray(embedded(moved) - embedded(model))
    np.testing.assert_allclose(difference[tokens == NEWLINE], 1.0, atol=ATOL)
    assert (tokens == NEWLINE).sum() >= F
    assert not difference[tokens != NEWLINE].any()


@one_kind
def test_a_token_that_stands_often_gets_its_whole_gradient_in_bfloat16(pair):
    """2,048 ones: a bfloat16 sum of ones stops at 256."""
    _, _, model, _, _ = pair
    graphdef, state = nnx.split(model)
    tokens = jnp.full((1, 2048), NEWLINE)

    def total(state):
        x = nnx.merge(graphdef, state).embed(tokens, compute_dtype=jnp.bfloat16)
        return x.astype(jnp.float32).sum()

    gradient = jax.grad(total)(state).text.table.get_value()
    np.testing.assert_array_equal(gradient[NEWLINE], np.full(WIDTH, 2048.0))


@pytest.mark.parametrize("shape", [{"fsdp": 2, "seq": 2, "tensor": 2}, {"seq": 8}], ids=str)
@one_kind
def test_mesh_changes_neither_features_nor_embeddings(pair, rng, shape):
    _, _, model, folder, _ = pair
    frames = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    want = model.encode(jnp.asarray(frames), stage="packed")
    tokens = np.full((2, 40), NEWLINE, np.int32)
    is_media = np.zeros((2, 40), bool)
    is_media[:, 4:36] = True
    features = np.zeros((2, 40, want.shape[-1]), np.float32)
    features[:, 4:36] = np.asarray(want).reshape(32, -1)
    args = jnp.asarray(tokens), jnp.asarray(is_media), jnp.asarray(features)
    mesh = make_mesh(**shape)
    graphdef, state = nnx.split(models.load(folder, mesh=mesh)[1])

    @jax.jit
    def run(state, args):
        ours = nnx.merge(graphdef, state)
        return ours.encode(frames, stage="packed"), ours.embed(*args)

    with jax.set_mesh(mesh):
        got, x = run(state, args)
    np.testing.assert_allclose(got, want, atol=ATOL)
    np.testing.assert_allclose(x, model.embed(*args), atol=ATOL)
    assert got.sharding.spec[0] is not None  # frames are split, not copied


@one_kind
def test_layout_says_what_encode_makes(pair, frames):
    _, cfg, model, _, _ = pair
    layout = vila.media_layout(cfg)
    assert (layout.image_size, layout.grid) == ((32, 32), (2, 2))
    assert (layout.media_token, layout.separator) == ("<vila/video>", "\n")
    assert model.encode(jnp.asarray(frames), stage="packed").shape[1] == np.prod(layout.grid)


@one_kind
def test_stage_is_the_deepest_frozen_one_and_knows_its_weights(pair):
    _, _, model, _, _ = pair
    state = nnx.state(model, nnx.Param)
    assert models.feature_stage(("vision",)) == "packed"
    assert models.feature_stage(("vision", "projector")) == "projected"
    parts = {
        stage: {p.partition(".")[0] for p in models.stage_weights(state, stage)}
        for stage in vila.STAGES
    }
    assert parts == {"packed": {"vision"}, "projected": {"vision", "projector"}}


@pytest.mark.parametrize("kind", ["identity", "linear"])
def test_a_projector_without_layers_or_with_one_goes_the_whole_way(tmp_path, frames, rng, kind):
    parts = write_vila(tmp_path / "v", kind=kind, llm_width=VISION_WIDTH)
    _, model = models.load(tmp_path / "v")
    tokens, is_media = row_of(16, rng)
    features = aligned(model.encode(jnp.asarray(frames), stage="packed"), is_media)
    x = model.embed(jnp.asarray(tokens)[None], jnp.asarray(is_media)[None], features)
    want = torch_embeddings(parts, frames, tokens).detach().numpy()
    np.testing.assert_allclose(x, want, atol=ATOL)


@one_kind
def test_an_unknown_stage_lists_the_known(pair, frames):
    _, _, model, _, _ = pair
    with pytest.raises(ValueError, match="choose one of packed, projected"):
        model.encode(jnp.asarray(frames), stage="pixels")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"s2": True}, "s2_scales=None must be sizes"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer=-9"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer=None"),
    ],
    ids=str,
)
@one_kind
def test_what_we_cannot_do_is_refused_by_name(pair, tmp_path, changes, named):
    folder = tmp_path / "changed"
    folder.mkdir()
    for sub in vila.FOLDERS:
        (folder / sub).symlink_to(pair[3] / sub)
    tree = json.loads((pair[3] / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=named):
        vila.read_config(folder)


@pytest.mark.parametrize(("select", "num_layers"), [(-1, 3), (-2, 2), (-3, 1), (1, 1), (3, 3)])
@one_kind
def test_hidden_state_number_says_how_many_layers_run(pair, tmp_path, select, num_layers):
    folder = tmp_path / "changed"
    folder.mkdir()
    for sub in vila.FOLDERS:
        (folder / sub).symlink_to(pair[3] / sub)
    tree = {"model_type": "llava_llama", "mm_vision_select_layer": select}
    (folder / "config.json").write_text(json.dumps(tree))
    assert vila.read_config(folder).num_vision_layers == num_layers


def test_what_the_features_depend_on_besides_weights_is_named(pair):
    """Checkpoints of equal weights do not share stored features if they read another layer."""
    cfg = pair[1]
    other = dataclasses.replace(cfg, num_vision_layers=cfg.num_vision_layers + 1)
    eps = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, norm_eps=1e-3))
    names = {vila.stage_identity(c, "packed") for c in (cfg, other, eps)}
    assert len(names) == 3
