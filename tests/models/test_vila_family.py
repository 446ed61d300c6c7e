"""What members of the VILA family differ in, against torch: pooling, layers, positions, texts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny_models import VISION_WIDTH, WIDTH, make_siglip, write_vila

from longrl_jax import config, models
from longrl_jax.models import siglip, vila, weights
from longrl_jax.stages import policy

ATOL = 2e-5  # float32 sums of up to 288 products, in another order; states are of order 1
TSP = "llava.model.encoders.TSPVideoEncoder"
SIDE = 2  # tokens along one side of a frame: 4 x 4 patches, 2 x 2 side by side


def tsp(*pool_sizes, **settings):
    return {"video_encoder": json.dumps({"_target_": TSP, "pool_sizes": pool_sizes, **settings})}


def states_of(parts, frames: np.ndarray, layer: int) -> torch.Tensor:
    pixels = (torch.tensor(frames).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        return parts["vision_tower"](pixels, output_hidden_states=True).hidden_states[layer]


def pooled_by_loop(tokens: torch.Tensor, pools) -> torch.Tensor:
    """[F, n, D] -> the tokens of a film in the order of its prompt."""
    x, out = tokens.reshape(len(tokens), SIDE, SIDE, -1), []
    for t, h, w in pools:
        for f in range(0, len(x), t):
            for y in range(0, SIDE, h):
                for column in range(0, SIDE, w):
                    cells = x[f : f + t, y : y + h, column : column + w]
                    out.append(cells.reshape(-1, x.shape[-1]).mean(dim=0))
    return torch.stack(out)


@pytest.mark.parametrize("pools", [[[4, 1, 1]], [[4, 1, 1], [2, 2, 2]]], ids=["one", "two"])
def test_pooled_films_equal_torch_in_the_order_of_the_prompt(tmp_path, rng, pools):
    parts = write_vila(tmp_path / "v", top=tsp(*pools))
    cfg, model = models.load(tmp_path / "v")
    frames = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        tokens = parts["mm_projector"](states_of(parts, frames, -2))
    want = pooled_by_loop(tokens, pools)
    view = vila.media_layout(cfg).video(100, 200, len(frames))
    assert view.unit_frames == max(t for t, _, _ in pools)
    units = len(frames) // view.unit_frames
    got = np.asarray(model.encode(jnp.asarray(frames), view=view, stage="projected"))
    assert got.shape == (units, np.prod(view.grid), WIDTH)
    rows, order = got.reshape(-1, WIDTH), view.order(units)
    assert (order is None) == (len(pools) == 1)
    rows = rows if order is None else rows[order]
    np.testing.assert_allclose(rows, want.numpy(), atol=ATOL)
    halves = [model.encode(x, view=view, stage="projected") for x in np.split(frames, 2)]
    np.testing.assert_allclose(np.concatenate(halves), got, atol=ATOL)  # encoded in chunks
    counts = [(times * units, n) for times, n in view.unit_tokens]
    assert sum(a * b for a, b in counts) == len(want)


@pytest.mark.parametrize("select", [0, -1])
def test_any_hidden_state_can_be_read(tmp_path, rng, select):
    """0: the patches, before all layers. -1: behind all, without the norm: hooked, since
    transformers puts the norm's output there."""
    parts = write_vila(tmp_path / "v", kind="linear", top={"mm_vision_select_layer": select})
    _, model = models.load(tmp_path / "v")
    frames = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    seen = []
    last = parts["vision_tower"].encoder.layers[-1]
    hook = last.register_forward_hook(lambda module, args, out: seen.append(out))
    states = states_of(parts, frames, select)
    hook.remove()
    if select == -1:
        states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    got = model.encode(jnp.asarray(frames), stage="packed")
    np.testing.assert_allclose(got, states.detach().numpy(), atol=ATOL)


def test_patch_features_leave_the_first_token_out(tmp_path, rng):
    top = {"mm_vision_select_feature": "patch"}
    parts = write_vila(tmp_path / "v", kind="mlp2x_gelu", top=top)
    cfg, model = models.load(tmp_path / "v")
    frames = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        want = parts["mm_projector"](states_of(parts, frames, -2)[:, 1:])
    got = model.encode(jnp.asarray(frames), stage="projected")
    np.testing.assert_allclose(got, want.numpy(), atol=ATOL)
    assert vila.media_layout(cfg).grid == (1, 15)


def spread(table: torch.Tensor, count: int) -> torch.Tensor:
    """The published formula, position by position; where it gives 0, the row it stands on."""
    out = []
    for i in range(count):
        place = i / (count - 1) * (len(table) - 1)
        low, high = int(np.floor(place)), int(np.ceil(place))
        mixed = (place - low) * table[high] + (high - place) * table[low]
        out.append(table[low] if low == high else mixed)
    return torch.stack(out)


@pytest.mark.parametrize("px", [48, pytest.param(24, marks=pytest.mark.slow)])
def test_another_resolution_spreads_the_positions_as_published(tmp_path, rng, px):
    parts = write_vila(tmp_path / "v", top={"vision_resolution": px})
    cfg, model = models.load(tmp_path / "v")
    small = parts["vision_tower"]
    tower = make_siglip(image_size=px)
    table = small.embeddings.position_embedding.weight.detach()
    state = {k: v for k, v in small.state_dict().items() if "position" not in k}
    name = "embeddings.position_embedding.weight"
    tower.load_state_dict(state | {name: spread(table, (px // 8) ** 2)}, strict=False)
    frames = rng.integers(0, 256, (2, px, px, 3), dtype=np.uint8)
    with torch.no_grad():
        want = parts["mm_projector"](states_of({"vision_tower": tower}, frames, -2))
    got = model.encode(jnp.asarray(frames), stage="projected")
    np.testing.assert_allclose(got, want.numpy(), atol=ATOL)
    assert vila.media_layout(cfg).image_size == (px, px)
    assert model.vision.positions.get_value().shape == (16, VISION_WIDTH)  # as in the file


def test_a_re_sampled_table_is_written_back_as_it_was(tmp_path):
    write_vila(tmp_path / "v", top={"vision_resolution": 48})
    cfg, model = models.load(tmp_path / "v")
    models.save(tmp_path / "out", model, cfg, tmp_path / "v")
    again = models.load(tmp_path / "out")[1]
    for name, x in models.arrays_of(model).items():
        np.testing.assert_array_equal(models.arrays_of(again)[name], x, err_msg=name)


@pytest.mark.slow
def test_every_member_goes_through_convert_and_comes_back_byte_by_byte(tmp_path):
    """A tree of config.json for each kind of setting -> random folder -> the same bytes."""
    from longrl_jax import convert

    tops = {
        "vila1_5_s2": {"s2": True, "s2_scales": "32,64", "s2_max_split_size": 32},
        "nvila": {"dynamic_s2": True, "s2_scales": "32,64", "image_aspect_ratio": "dynamic_s2"},
        "nvila_lite": {"image_aspect_ratio": "dynamic"},
        "longvila_r1": {"model_type": "vila", "video_encoder": {"_target_": TSP}},
    }
    for name, top in tops.items():
        tree = tiny_tree() | top
        if "s2_scales" in top:
            tree["mm_projector_cfg"]["mm_projector_type"] = "mlp_downsample_3x3_s2"
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
        convert.init(tmp_path / f"{name}.json", tmp_path / name)
        assert convert.from_hf(tmp_path / name, tmp_path / f"{name}_again") > 20
        said = json.loads((tmp_path / f"{name}_again" / "config.json").read_text())
        assert {key: said[key] for key in top} == top


def tiny_tree() -> dict:
    llm = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tower = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return {
        "model_type": "llava_llama",
        "llm_cfg": {"model_type": "llama"} | llm | heads,
        "vision_tower_cfg": {**tower.to_dict(), "model_type": "siglip_vision_model"},
        "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"},
    }


S2 = {"s2": True, "s2_scales": "32,64", "s2_max_split_size": 32}
DYNAMIC = {"dynamic_s2": True, "s2_scales": "32,64", "image_aspect_ratio": "dynamic_s2"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (S2 | {"s2_scales": "big"}, "s2_scales='big'"),
        (S2 | {"s2_max_split_size": 48}, "s2_max_split_size is 48, but the tower takes .* 32 px"),
        (S2 | {"s2_resize_output_to_scale_idx": 2}, "s2_resize_output_to_scale_idx=2"),
        (DYNAMIC | {"s2_scales": "32,48"}, "s2_scales='32,48' must be .* multiples"),
        (DYNAMIC | {"max_tiles": 3}, "4 tiles or more, over max_tiles=3"),
        ({"image_aspect_ratio": "dynamic_s2"}, "needs dynamic_s2=true"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' is not supported"),
        ({"video_max_tiles": 8}, "video_max_tiles=8"),
        ({"video_encoder": {"_target_": "llava.Other"}}, "_target_='llava.Other' is not supported"),
        ({"video_encoder": "{"}, "is not valid JSON"),
        ({"video_encoder": {"start_tokens": 3}}, "start_tokens=3 must be a text"),
        (tsp([8, 1]), "pool_sizes holds .8, 1."),
        (tsp([8, 3, 1]), "does not divide the 2 x 2 tokens"),
        ({"mm_vision_select_feature": "patch"}, "'patch' leaves no square of tokens"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature='cls'"),
        ({"vision_resolution": 48, "interpolate_mode": "cubic"}, "interpolate_mode='cubic'"),
    ],
    ids=str,
)
def test_a_setting_that_we_cannot_follow_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=f"here.*{named}"):
        vila.parse_config(tiny_tree() | changes, where="here")


def test_settings_of_a_film_are_read_from_a_text_or_an_object():
    texts = {"_target_": TSP, "start_tokens": "a", "end_tokens": None, "sep_tokens": "z"}
    for value in (texts, json.dumps(texts)):
        cfg = vila.parse_config(tiny_tree() | {"video_encoder": value}, where="here")
        layout = vila.media_layout(cfg)
        assert (layout.opening, layout.separator, layout.ending) == ("a", "", "z")
        assert layout.image_texts == ("", "\n")
        assert layout.video(1, 1, 300).unit_frames == 8  # no pool_sizes: LongVILA-R1's rule


def test_a_trained_projector_and_pooled_films_do_not_go_together():
    cfg = vila.parse_config(tiny_tree() | tsp([4, 1, 1]), where="here")
    layout = policy.media_layout(vila, cfg, config.DataConfig(root="x"))
    with pytest.raises(ValueError, match="put projector into model.frozen, or set data.frame_pool"):
        policy.check_pools(layout, "packed")
    policy.check_pools(layout, "projected")
    layout = policy.media_layout(vila, cfg, config.DataConfig(root="x", frame_pool=1))
    policy.check_pools(layout, "packed")
    layout = policy.media_layout(vila, cfg, config.DataConfig(root="x", frame_pool=2))
    assert layout.video(9, 9, 8).unit_frames == 2


def test_the_tower_of_any_resolution_has_the_files_table():
    tree = tiny_tree()["vision_tower_cfg"]
    cfg = siglip.parse_config(tree, where="here", resolution=64)
    arrays = weights.by_path(nnx.state(nnx.eval_shape(lambda: siglip.Tower(cfg, rngs=nnx.Rngs(0)))))
    assert arrays["positions"].shape == (16, 24) and cfg.grid == 8
