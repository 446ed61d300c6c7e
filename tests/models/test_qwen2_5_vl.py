"""Qwen2.5-VL put together against `transformers`: positions, logits, round trip, processing.

transformers 5.19 places text behind a film otherwise than vLLM and we do, so with films it is
driven with our positions; with text and images it goes unaided.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from test_weights import raw_tensors
from tiny_qwen2_5_vl import (
    IDS,
    TEXT,
    TOKEN_PX,
    UNIT,
    VISION,
    published_config,
    published_name,
    their_patches,
    write_qwen2_5_vl,
)

from longrl_jax import models
from longrl_jax.models import copying, qwen2_5_vl, weights
from longrl_jax.types import Media, View

ATOL = 2e-5  # float32 sums of up to 192 products, in another order; features are of order 1
LOGITS_ATOL = 1e-4  # through two more layers and the head; logits are of order 10
GRAD_RTOL = 1e-5  # of the largest gradient: the same sums, in another order
TPS = VISION["tokens_per_second"]
IMAGE, VIDEO = IDS["image_token_id"], IDS["video_token_id"]
START, END = IDS["vision_start_token_id"], IDS["vision_end_token_id"]


def medium(kind, grid, *, unit_s=1.0, offset=0) -> Media:
    return Media(
        kind=kind, path="", key="", grid=grid, times_s=(), view=View(size=(0, 0), grid=grid[1:]),
        num_tokens=math.prod(grid), offset=offset, unit_s=unit_s,
    )  # fmt: skip


WORLDS = {
    "text": [],
    "an image": [("image", (1, 3, 5), 1.0)],
    "images": [("image", (1, 3, 5), 1.0), ("image", (1, 2, 2), 1.0), ("image", (1, 3, 2), 1.0)],
    "a film": [("video", (6, 3, 2), 1.5)],
    "a film of parts of a second": [("video", (9, 2, 2), 0.35)],
    "two films": [("video", (3, 3, 5), 4.0), ("video", (2, 2, 2), 1.0)],
    "both": [("image", (1, 2, 2), 1.0), ("video", (4, 3, 2), 2.0), ("image", (1, 3, 5), 1.0)],
}
"""kind, grid in tokens, seconds a unit."""


class Case:
    """A prompt with its media, laid out by hand, and frames to encode."""

    def __init__(self, world, rng):
        tokens = rng.integers(0, 90, 5).tolist()
        self.media = []
        for kind, grid, unit_s in world:
            tokens += [START]
            self.media.append(medium(kind, grid, unit_s=unit_s, offset=len(tokens)))
            tokens += [IMAGE if kind == "image" else VIDEO] * math.prod(grid)
            tokens += [END, *rng.integers(0, 90, 3).tolist()]
        self.tokens = np.array(tokens, np.int32)
        self.is_media = np.isin(self.tokens, (IMAGE, VIDEO))
        self.rope_pos, self.next_rope_pos = qwen2_5_vl.rope_positions(
            len(tokens), self.media, tokens_per_second=TPS
        )
        self.frames = [
            rng.integers(0, 256, (UNIT * t, y * TOKEN_PX, x * TOKEN_PX, 3), dtype=np.uint8)
            for _, (t, y, x), _ in world
        ]
        for m, frames in zip(self.media, self.frames, strict=True):
            if m.kind == "image":
                frames[1:] = frames[:1]

    def of_kind(self, kind):
        return [f for m, f in zip(self.media, self.frames, strict=True) if m.kind == kind]

    def theirs(self) -> dict:
        """What transformers' model takes, but for positions."""
        inputs: dict = {"input_ids": torch.tensor(self.tokens[None], dtype=torch.long)}
        for kind, rows, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if frames := self.of_kind(kind):
                pixels = [
                    (f / np.float32(255) - qwen2_5_vl.IMAGE_MEAN) / qwen2_5_vl.IMAGE_STD
                    for f in frames
                ]
                parts = [their_patches(p.astype(np.float32)) for p in pixels]
                inputs[rows] = torch.cat([r for r, _ in parts])
                inputs[grid] = torch.cat([g for _, g in parts])
        return inputs

    def their_positions(self, model) -> np.ndarray:
        kinds = np.zeros(len(self.tokens), int)
        kinds[self.tokens == IMAGE], kinds[self.tokens == VIDEO] = 1, 2
        grids = {k: v for k, v in self.theirs().items() if k.endswith("grid_thw")}
        seconds = [m.unit_s for m in self.media if m.kind == "video"]
        positions, delta = model.model.get_rope_index(
            torch.tensor(self.tokens[None], dtype=torch.long),
            torch.tensor(kinds[None]),
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
            **grids,
        )
        return positions[:, 0].numpy().T, len(self.tokens) + int(delta)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    """(transformers' model, our config, our model, folder)."""
    folder = tmp_path_factory.mktemp("vl") / "checkpoint"
    theirs = write_qwen2_5_vl(folder, tied=request.param)
    return theirs, *models.load(folder), folder


untied = pytest.mark.parametrize("pair", [False], indirect=True, scope="module", ids=["untied"])


@pytest.fixture(scope="module")
def run(pair):
    """(frames, stage) -> features and (case rows) -> logits of our model, jitted."""
    graphdef, state = nnx.split(pair[2])

    @functools.partial(jax.jit, static_argnames="stage")
    def encode(frames, stage="projected"):
        return nnx.merge(graphdef, state).encode(frames, stage=stage)

    @jax.jit
    def logits(tokens, is_media, features, rope_pos, segment):
        model = nnx.merge(graphdef, state)
        x = model.embed(tokens, is_media, features, stage="projected")
        order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        h = model.hidden(x, rope_pos, order, jnp.zeros_like(tokens), segment)
        return h @ model.head()

    return encode, logits


def rows_of(cases, encode):
    """Cases in a batch of one size, the rest padding; where no feature stands is nan."""
    B, T = len(WORLDS), 128
    tokens, is_media = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    rope_pos, segment = np.zeros((B, T, 3), np.int32), np.zeros((B, T), np.int32)
    features = np.full((B, T, TEXT["hidden_size"]), np.nan, np.float32)
    for b, case in enumerate(cases):
        P = len(case.tokens)
        tokens[b, :P], is_media[b, :P] = case.tokens, case.is_media
        rope_pos[b, :P], segment[b, :P] = case.rope_pos, 1
        for m, frames in zip(case.media, case.frames, strict=True):
            rows = [encode(frames[i : i + UNIT])[0] for i in range(0, len(frames), UNIT)]
            features[b, m.offset : m.offset + m.num_tokens] = np.concatenate(rows)
    return tokens, is_media, features, rope_pos, segment


@untied
@pytest.mark.parametrize("world", ["text", "an image", "images"])
def test_positions_of_text_and_images_equal_transformers(pair, rng, world):
    case = Case(WORLDS[world], rng)
    want, want_next = case.their_positions(pair[0])
    np.testing.assert_array_equal(case.rope_pos, want)
    assert case.next_rope_pos == want_next


def test_positions_of_a_film_drawn_by_hand():
    """Two words, 3 units of 2 x 1 tokens a second and a half apart, two words."""
    film = medium("video", (3, 2, 1), unit_s=1.5, offset=2)
    got, following = qwen2_5_vl.rope_positions(10, [film], tokens_per_second=2)
    want = [
        (0, 0, 0), (1, 1, 1),
        (2, 2, 2), (2, 3, 2),
        (5, 2, 2), (5, 3, 2),
        (8, 2, 2), (8, 3, 2),
        (9, 9, 9), (10, 10, 10),
    ]  # fmt: skip
    np.testing.assert_array_equal(got, want)
    assert following == 11


@untied
def test_transformers_places_text_behind_a_film_otherwise(pair, rng):
    """Pinned, so that we hear of it when transformers changes (docs/parity.md)."""
    case = Case(WORLDS["a film"], rng)
    theirs, _ = case.their_positions(pair[0])
    film = case.media[0]
    inside = slice(0, film.offset + film.num_tokens)
    said = "transformers changed its positions of films: compare again, then mend docs/parity.md"
    np.testing.assert_array_equal(case.rope_pos[inside], theirs[inside], err_msg=said)
    after = film.offset + film.num_tokens
    assert theirs[after].tolist() == [film.offset + max(film.grid[1:])] * 3, said
    assert case.rope_pos[after].tolist() == [film.offset + 15 + 1] * 3  # int(5 * 1.5 * 2) = 15


@untied
def test_logits_equal_transformers(pair, run, rng):
    theirs, _, _, _ = pair
    encode, logits = run
    for name, world in WORLDS.items():
        case = Case(world, rng)
        inputs = case.theirs()
        if case.of_kind("video"):
            inputs["position_ids"] = torch.tensor(case.rope_pos.T[:, None], dtype=torch.long)
        elif case.of_kind("image"):
            inputs["mm_token_type_ids"] = torch.tensor((case.tokens == IMAGE).astype(int)[None])
        with torch.no_grad():
            want = theirs(**inputs).logits[0].numpy()
        got = logits(*rows_of([case], encode))[0, : len(case.tokens)]
        np.testing.assert_allclose(got, want, atol=LOGITS_ATOL, err_msg=name)


@untied
def test_gradients_equal_transformers(pair, run, rng):
    """Of the language model and the merger, on a prompt with images and a film."""
    theirs, cfg, model, _ = pair
    case = Case(WORLDS["both"], rng)
    T = len(case.tokens)
    positions = torch.tensor(case.rope_pos.T[:, None], dtype=torch.long)
    logits = theirs(**case.theirs(), position_ids=positions).logits[0, :-1]
    targets = torch.tensor(case.tokens[1:], dtype=torch.long)
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    want = {published_name(n): p.grad.numpy() for n, p in theirs.named_parameters()}

    features = np.zeros((1, T, qwen2_5_vl.feature_width(cfg, "packed")), np.float32)
    for m, frames in zip(case.media, case.frames, strict=True):
        rows = [run[0](frames[i : i + UNIT], "packed")[0] for i in range(0, len(frames), UNIT)]
        features[0, m.offset : m.offset + m.num_tokens] = np.concatenate(rows)
    graphdef, params = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(params):
        ours = nnx.merge(graphdef, params)
        tokens = jnp.asarray(case.tokens)[None]
        x = ours.embed(tokens, jnp.asarray(case.is_media)[None], features, stage="packed")
        order, one = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
        h = ours.hidden(x, jnp.asarray(case.rope_pos)[None], order, 0 * one, one)
        logp = jax.nn.log_softmax(h[0, :-1] @ ours.head())
        return -jnp.take_along_axis(logp, tokens[0, 1:, None], axis=1).sum()

    largest = max(np.abs(x).max() for x in want.values())
    for name, got in weights.to_hf(gradient(params), qwen2_5_vl.table(cfg)):
        if not name.startswith(("visual.blocks", "visual.patch_embed")):  # frozen: no gradient
            np.testing.assert_allclose(
                got, want[name], rtol=0, atol=GRAD_RTOL * largest, err_msg=name
            )


@untied
def test_every_row_of_a_mixed_batch_is_as_it_is_alone(run, rng):
    encode, logits = run
    cases = [Case(world, rng) for world in WORLDS.values()]
    together = logits(*rows_of(cases, encode))
    for b, case in enumerate(cases):
        alone = logits(*rows_of([case], encode))[0]
        P = len(case.tokens)
        np.testing.assert_allclose(together[b, :P], alone[:P], atol=LOGITS_ATOL)


@untied
def test_packed_states_through_the_merger_are_the_projected(pair, run, rng):
    _, cfg, model, _ = pair
    frames = rng.integers(0, 256, (2, 3 * TOKEN_PX, 2 * TOKEN_PX, 3), dtype=np.uint8)
    packed, projected = (run[0](frames, stage) for stage in qwen2_5_vl.STAGES)
    for x, stage in ((packed, "packed"), (projected, "projected")):
        assert x.shape == (1, 6, qwen2_5_vl.feature_width(cfg, stage))
    is_media = jnp.ones((1, 6), bool)
    got = model.embed(jnp.full((1, 6), VIDEO), is_media, packed, stage="packed")
    np.testing.assert_allclose(got, projected, atol=ATOL)


def test_a_round_trip_changes_no_byte(pair, tmp_path):
    _, cfg, model, folder = pair
    models.save(tmp_path / "out", model, cfg, folder)
    assert raw_tensors(tmp_path / "out") == raw_tensors(folder)
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_mixed_checkpoint_keeps_the_type_of_every_tensor(tmp_path):
    source = tmp_path / "source"
    write_qwen2_5_vl(source, bfloat16=("visual.blocks", "mlp.up_proj", "embed_tokens"))
    kinds = {kind for kind, _, _ in raw_tensors(source).values()}
    assert kinds == {"torch.float32", "torch.bfloat16"}
    cfg, model = models.load(source)
    models.save(tmp_path / "out", model, cfg, source)
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)


@untied
def test_transformers_opens_our_export_and_we_open_what_it_writes(pair, run, rng, tmp_path):
    """It names tensors and fields otherwise than published folders do; both are read and kept."""
    theirs, cfg, model, folder = pair
    models.save(tmp_path / "ours", model, cfg, folder)
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours")
    for (name, x), y in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    theirs.save_pretrained(tmp_path / "theirs")
    cfg_2, model_2 = models.load(tmp_path / "theirs")
    assert (cfg_2.text, cfg_2.vision) == (cfg.text, cfg.vision)
    for path, x in models.arrays_of(model).items():
        np.testing.assert_array_equal(models.arrays_of(model_2)[path], x, err_msg=path)
    models.save(tmp_path / "back", model_2, cfg_2, tmp_path / "theirs")
    assert raw_tensors(tmp_path / "back") == raw_tensors(tmp_path / "theirs")


@untied
def test_names_of_newer_folders_are_read_and_kept(pair, tmp_path):
    """transformers from 4.52 may write model.language_model. and model.visual."""
    from safetensors.torch import load_file, save_file

    _, cfg, model, folder = pair
    new = tmp_path / "new"
    new.mkdir()
    renamed = {
        name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): x
        for name, x in load_file(folder / "model.safetensors").items()
    }
    save_file(renamed, new / "model.safetensors")
    (new / "config.json").write_text((folder / "config.json").read_text())
    cfg_2, model_2 = models.load(new)
    assert cfg_2.prefixes == qwen2_5_vl.RENAMED
    assert cfg_2 == models.load(folder)[0]  # so that one may be the other's KL reference
    models.save(tmp_path / "out", model_2, cfg_2, new)
    assert raw_tensors(tmp_path / "out") == raw_tensors(new)


@untied
def test_the_language_model_alone_is_no_folder(pair, tmp_path):
    with pytest.raises(ValueError, match="positions in three dims"):
        copying.copy(pair[-1], tmp_path / "text", text_only=True)
    assert not (tmp_path / "text").exists()


FULL_SIZES = {  # width, MLP, layers, heads, key heads, vocabulary, tied, tower MLP, parameters
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420, 3_754_622_976),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420, 8_292_166_656),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456, 33_452_718_336),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456, 73_410_777_344),
}
"""Config and number of parameters of the published Qwen2.5-VL-*-Instruct; their pages round the
latter to 3.75, 8.29, 33.5 and 73.4 billion."""


def full_config(size) -> dict:
    D, mlp, num_layers, heads, key_heads, vocab, tied, vision_mlp, _ = FULL_SIZES[size]
    return {
        "model_type": "qwen2_5_vl", "vocab_size": vocab, "hidden_size": D, "intermediate_size": mlp,
        "num_hidden_layers": num_layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied, "use_sliding_window": False, "sliding_window": 32768,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "num_heads": 16,
            "intermediate_size": vision_mlp, "in_chans": 3, "out_hidden_size": D, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        },
    }  # fmt: skip


@pytest.mark.parametrize("size", FULL_SIZES)
def test_full_sizes_have_the_names_and_shapes_of_transformers(size):
    """By shape alone: theirs on torch's meta device, ours by eval_shape."""
    tree = full_config(size)
    cfg = qwen2_5_vl.parse_config(tree, where=size)
    state = nnx.state(nnx.eval_shape(lambda: qwen2_5_vl.Model(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    arrays, table = weights.by_path(state), qwen2_5_vl.table(cfg)
    ours = {}
    for path, row in table.items():
        shape = arrays[path].shape[1:] if weights.stacked(row) else arrays[path].shape
        if row.transpose is not None:
            shape = tuple(shape[i] for i in np.argsort(row.transpose))
        for i in range(arrays[path].shape[0] if weights.stacked(row) else 1):
            ours[row.hf.format(i=i)] = shape
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(**{k: v for k, v in tree.items() if k != "model_type"})
        )
    want = {published_name(name): tuple(x.shape) for name, x in theirs.state_dict().items()}
    if cfg.text.tied:
        del want["lm_head.weight"]
    assert ours == want
    assert sum(map(math.prod, ours.values())) == FULL_SIZES[size][-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6]}}, r"mrope_section=\[4, 6\]"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 7]}}, r"\[4, 6, 7\]"),
        ({"rope_scaling": None}, "mrope_section=None"),
        ({"vision_config": VISION | {"out_hidden_size": 32}}, "out_hidden_size=32"),
        ({"vision_config": None}, "patch_size=None"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_config_we_cannot_follow_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        qwen2_5_vl.parse_config(published_config(tied=False) | change, where="here")


@pytest.mark.parametrize(
    ("field", "value"), [("image_mean", [0.5, 0.5, 0.5]), ("patch_size", 16), ("merge_size", 4)]
)
def test_a_processor_that_prepares_frames_otherwise_is_refused(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps(published_config(tied=False)))
    cfg = qwen2_5_vl.read_config(tmp_path)
    tree = qwen2_5_vl.processor_config(cfg) | {field: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {field}="):
        qwen2_5_vl.read_config(tmp_path)


@pytest.mark.parametrize(
    "size", [(360, 640), (1080, 1920), (64, 64), (2160, 3840), (500, 37), (28, 28)]
)
@pytest.mark.parametrize("bounds", [(100_352, 602_112), (3136, 50_176)])
def test_sizes_equal_transformers(size, bounds):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    want = smart_resize(*size, factor=28, min_pixels=bounds[0], max_pixels=bounds[1])
    assert qwen2_5_vl.smart_resize(*size, *bounds, factor=28) == want


def test_a_ribbon_is_refused():
    with pytest.raises(ValueError, match="201 x 1 px"):
        qwen2_5_vl.smart_resize(201, 1, 784, 7840, factor=28)


def test_pixels_equal_the_processors(rng):
    """Frames, resized by us, against transformers' image and video processors.

    Images go through the same Pillow. Films go through torchvision's resize there, which rounds
    weights otherwise: at most one level of 255 (measured) in few pixels.
    """
    from longrl_jax.data import video

    y, x = np.mgrid[:90, :160]
    smooth = 127 + 60 * np.sin(x / 9 + np.arange(4)[:, None, None]) + 60 * np.cos(y / 7)
    frames = np.stack([smooth, 255 - smooth, smooth[::-1]], axis=-1) + rng.normal(
        0, 5, (4, 90, 160, 3)
    )
    frames = frames.clip(0, 255).astype(np.uint8)
    bounds = (28 * 28 * 4, 28 * 28 * 10)
    size = qwen2_5_vl.smart_resize(90, 160, *bounds, factor=28)
    assert size not in ((90, 160), (84, 168))
    resized = np.stack([video._resize(frame, size) for frame in frames])
    ours = (resized / np.float32(255) - qwen2_5_vl.IMAGE_MEAN) / qwen2_5_vl.IMAGE_STD
    options = {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}

    image = transformers.Qwen2VLImageProcessorPil(**options)(frames[0], return_tensors="np")
    twice = np.stack([ours[0]] * 2).astype(np.float32)
    want, grid = _rows(twice)
    np.testing.assert_array_equal(image["image_grid_thw"], grid)
    np.testing.assert_allclose(want, image["pixel_values"], atol=1e-6)

    processor = transformers.Qwen2VLVideoProcessor(**options, cap_pixels_per_frame=False)
    film = processor(videos=[torch.tensor(frames).permute(0, 3, 1, 2)], return_tensors="np")
    want, grid = _rows(ours.astype(np.float32))
    np.testing.assert_array_equal(film["video_grid_thw"], grid)
    levels = np.abs(want - film["pixel_values_videos"]) * 255 * min(qwen2_5_vl.IMAGE_STD)
    assert levels.max() < 1.1 and (levels > 0.5).mean() < 0.05


def _rows(pixels):
    """Patches of 14 px in transformers' order, by loops."""
    F, Y, X, _ = pixels.shape
    rows = [
        pixels[f : f + 2, r * 14 : r * 14 + 14, c * 14 : c * 14 + 14].transpose(3, 0, 1, 2).ravel()
        for f in range(0, F, 2)
        for top in range(0, Y // 14, 2)
        for left in range(0, X // 14, 2)
        for r in (top, top + 1)
        for c in (left, left + 1)
    ]
    return np.stack(rows), [[F // 2, Y // 14, X // 14]]
