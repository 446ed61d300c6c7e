"""From a film to the prompt and the stored features of a backbone whose frames have any size."""

import copy
import dataclasses
import shutil
import types
from pathlib import Path

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers.image_utils import load_image

from longrl_jax import config, convert, encode, models
from longrl_jax.data import image, prompts, video
from longrl_jax.plan import programs
from longrl_jax.sharding import make_mesh
from longrl_jax.stages.policy import media_layout
from longrl_jax.types import Example, MediaFile
from rollout_bridge.video_cache import VideoStore

ROOT = Path(__file__).parents[1]
RTOL = 1e-5  # of the largest number, float32: other batch sizes add in another order
BOUNDS = {"min_pixels": 4 * 28 * 28, "max_pixels": 8 * 28 * 28}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny random checkpoint, and a film of 2.3 s at 10 frames a second."""
    folder = tmp_path_factory.mktemp("vl")
    convert.init(ROOT / "configs/models/tiny_qwen2_5_vl.json", folder / "init")
    cfg, model = models.load(folder / "init")
    clips.make(folder / "film.mp4", num_frames=23, size=(64, 96))
    return types.SimpleNamespace(
        folder=folder,
        tokenizer=prompts.load_tokenizer(folder / "init"),
        backbone=models.backbone_of(folder / "init"),
        cfg=cfg,
        model=model,
    )


def layout_of(world, **data):
    return media_layout(world.backbone, world.cfg, config.DataConfig(root="x", **data))


FILM = MediaFile(kind="video", path="film.mp4")


def ask(world, *, media=(FILM,), **settings):
    settings = {"num_frames": 64, "fps": 10.0} | settings
    return prompts.encode_prompt(
        Example(id="q", question="What is shown?", answer="A", media=media),
        tokenizer=world.tokenizer,
        layout=layout_of(world, **BOUNDS),
        decoder="pyav",
        template="direct",
        root=world.folder,
        **settings,
    )


def test_a_prompt_holds_units_of_two_frames_between_start_and_end(world):
    prompt = ask(world)
    (film,) = prompt.media
    # 64 x 96 px hold over 4 tokens: rounded to 56 x 84, 2 x 3 tokens; 23 frames are 12 units
    assert (film.view.size, film.grid, film.num_tokens) == ((56, 84), (12, 2, 3), 72)
    assert len(film.times_s) == 24 and film.times_s[-1] == film.times_s[-2] == 2.2
    assert film.unit_s == pytest.approx(0.2)
    names = world.tokenizer.convert_ids_to_tokens(prompt.tokens.tolist())
    inside = slice(film.offset, film.offset + 72)
    assert set(names[inside]) == {"<|video_pad|>"} and prompt.is_media.sum() == 72
    assert prompt.is_media[inside].all()
    assert names[film.offset - 1] == "<|vision_start|>"
    assert names[film.offset + 72] == "<|vision_end|>"
    text = world.tokenizer.decode(prompt.tokens[film.offset + 73 :])
    assert text.startswith("What is shown?\nWatch the video")
    # unit 11 at int(11 * 0.2 * 2) = 4; columns reach 2, rows 1: text goes on at 5
    start = film.offset
    assert prompt.rope_pos[start + 71].tolist() == [start + 4, start + 1, start + 2]
    assert prompt.rope_pos[start + 72].tolist() == [start + 5] * 3
    assert prompt.next_rope_pos == len(prompt.tokens) - 72 + 5


CHAT = (  # as published checkpoints say it, but for the system's turn
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("at", [(0,), (0, 0), (5, 14, 17)])
def test_images_are_laid_out_as_by_the_processor_of_transformers(world, at):
    """Token ids and grids of Qwen2_5_VLProcessor, which gets words and pictures in order."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    fewest, most = 2 * 784, 20 * 784
    question, content, files, used = "Are  and  alike ?", [], [], 0
    for i, place in enumerate(at):
        size = ((64, 96), (200, 30), (300, 411))[i]
        rng = np.random.default_rng(i)
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        image.write_png(world.folder / f"{i}.png", picture)
        files.append(MediaFile(kind="image", path=f"{i}.png", at=place))
        content += [{"type": "text", "text": question[used:place]}, {"type": "image"}]
        used = place
    example = Example(id="q", question=question, answer="A", media=tuple(files))
    content.append({"type": "text", "text": prompts.user_text(example, "direct")[used:]})
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.chat_template = CHAT
    prompt = prompts.encode_prompt(
        example, tokenizer=tokenizer, num_frames=4, fps=0.0, decoder="pyav", template="direct",
        layout=layout_of(world, image_min_pixels=fewest, image_max_pixels=most), root=world.folder,
    )  # fmt: skip
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": fewest, "longest_edge": most}
        ),
        tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(), chat_template=CHAT,
    )  # fmt: skip
    turns = [{"role": "user", "content": content}]
    rendered = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    pictures = [load_image(str(world.folder / file.path)) for file in files]
    want = processor(text=[rendered], images=pictures, return_tensors="np")
    assert prompt.tokens.tolist() == want["input_ids"][0].tolist()
    grids = [[t, 2 * rows, 2 * columns] for t, rows, columns in (m.grid for m in prompt.media)]
    assert grids == want["image_grid_thw"].tolist()


def test_bounds_of_images_are_those_of_the_checkpoint(world, tmp_path):
    assert layout_of(world).image_pixels == (3136, 12845056)  # published, as convert writes them
    for said, bounds in {
        '{"min_pixels": 784, "max_pixels": 7840}': (784, 7840),
        '{"size": {"shortest_edge": 784, "longest_edge": 7840}}': (784, 7840),
        '{"max_pixels": 7840, "size": {"shortest_edge": 784, "longest_edge": 1}}': (784, 7840),
        "{}": (3136, 1003520),  # what transformers takes then
    }.items():
        shutil.copy(world.folder / "init" / "config.json", tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(said)
        layout = world.backbone.media_layout(world.backbone.read_config(tmp_path))
        assert layout.image_pixels == bounds
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 9, "max_pixels": 8}')
    with pytest.raises(ValueError, match="min_pixels=9 to max_pixels=8 cannot be"):
        world.backbone.read_config(tmp_path)


def test_frames_spread_over_the_film_are_timed_by_their_distance(world):
    (film,) = ask(world, num_frames=4, fps=0.0).media
    assert film.grid[0] == 2 and film.unit_s == pytest.approx(2 * 2.3 / 4)
    (still,) = ask(world, num_frames=1, fps=0.0).media
    assert still.times_s == (0.0, 0.0) and still.grid[0] == 1 and still.unit_s == 1.0


def test_a_text_prompt_counts_all_three_positions(world):
    prompt = ask(world, media=())
    P = len(prompt.tokens)
    np.testing.assert_array_equal(prompt.rope_pos, np.repeat(np.arange(P)[:, None], 3, axis=1))
    assert prompt.next_rope_pos == P and not prompt.media


def test_the_size_is_part_of_the_key(world):
    other = dataclasses.replace(layout_of(world, **BOUNDS), pixels=(784, 4 * 784))
    keys = set()
    for layout in (layout_of(world, **BOUNDS), other):
        (film,) = prompts.encode_prompt(
            Example(id="q", question="?", answer="A", media=(FILM,)),
            tokenizer=world.tokenizer, layout=layout, num_frames=4, fps=0.0, decoder="pyav",
            template="direct", root=world.folder,
        ).media  # fmt: skip
        keys.add(film.key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"min_pixels": 9000, "max_pixels": 8000}, "9000 to 8000 pixels"),
        ({"min_pixels": 100, "max_pixels": 700}, "one token has 784"),
        ({"image_max_pixels": 700}, "data.image_max_pixels=700: pictures of 3136 to 700"),
        ({"timestamp": "<{t:.0f}s>"}, "data.timestamp='<{t:.0f}s>'"),
    ],
)
def test_settings_that_it_cannot_follow_are_refused(world, data, named):
    with pytest.raises(ValueError, match=named):
        layout_of(world, **data)


@pytest.mark.parametrize("name", ["tiny_vila.json", "qwen2"])
def test_bounds_of_pixels_are_for_frames_of_any_size(name):
    backbone, cfg = (
        models.read_shape(ROOT / "configs/models" / name)
        if name.endswith("json")
        else (models.BACKBONES["qwen2"], None)
    )
    with pytest.raises(ValueError, match="data.max_pixels=8000 are for backbones whose pictures"):
        media_layout(backbone, cfg, config.DataConfig(root="x", max_pixels=8000))


def test_stored_features_do_not_depend_on_chunks_or_devices(world, tmp_path):
    """24 frames in chunks of 20 and 4 (padded to 8) over two devices, against all at once."""
    prompt = ask(world)
    (film,) = prompt.media
    graphdef, frozen, trained = nnx.split(
        world.model, lambda path, x: path[0] in ("vision", "projector"), ...
    )
    mesh = make_mesh(seq=2, devices=jax.devices()[:2])
    encoder = encode.make_encoder(
        graphdef, frozen, trained, stage="projected", width=world.cfg.text.width,
        dtype=jnp.float32, mesh=mesh, digest="w0", chunk_frames=20,
    )  # fmt: skip
    assert encoder.chunk_sizes(film.view) == (8, 20)  # whole units for both devices
    store = VideoStore(tmp_path / "store", 2**30)
    with video.DecoderPool(1, timeout_s=60) as pool:
        features, refused = encode.embed(encoder, [prompt], store, pool, decoder="pyav")
    job = encode.job_of(film, "pyav")
    (frames,) = video.read_frames(job, chunk=64)
    want = world.model.encode(frames, stage="projected").reshape(film.num_tokens, -1)
    assert not refused
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(features[film.key], want, rtol=0, atol=RTOL * scale)
    store.close()


def test_convert_describes_and_copies_it(world, tmp_path):
    said = "\n".join(convert.inspect(world.folder / "init"))
    assert "init: qwen2_5_vl" in said and "visual float32" in said and "llm float32" in said
    assert "frames keep their aspect, 100352 to 602112 px; 28 x 28 px of 2 frames" in said
    assert "images keep theirs, 3136 to 12845056 px" in said
    assert convert.from_hf(world.folder / "init", tmp_path / "copy") > 60
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (
            world.folder / "init" / name
        ).read_bytes()


def test_a_film_that_its_container_turns_is_refused(world, tmp_path):
    """Its size was chosen for pictures as stored; turned ones would be distorted."""
    path = clips.make(tmp_path / "turned.mp4", num_frames=8, size=(64, 96), rotation=90)
    turned = dataclasses.replace(ask(world).media[0], path=str(path), times_s=(0.0, 0.1))
    job = encode.job_of(turned, "pyav")
    with video.DecoderPool(1, timeout_s=60) as pool:
        (item,) = pool.decode([job], chunk=8)
    assert item.error.kind == "turned" and "96 x 64, not 64 x 96 px" in str(item.error)


def test_the_published_size_is_planned_with_the_programs_of_training(monkeypatch):
    """Traced from shapes, on simulated devices; nothing is allocated or compiled."""
    monkeypatch.chdir(ROOT)
    cfg = config.load(ROOT / "configs/qwen2_5_vl_3b_video_grpo.yaml")
    mesh = programs.mesh_of(cfg, jax.devices()[:8])
    policy, state = programs.abstract_policy(cfg, mesh)
    row = programs.row_of(cfg, policy.backbone, policy.model_cfg)
    # films of 16:9: 224 x 420 px, 8 x 15 tokens for two frames
    assert (row.frame_tokens, row.unit_frames, row.rope_axes) == (120, 2, 3)
    assert row.prompt_tokens == 128 * 120 + programs.QUESTION_TOKENS
    passes = programs.host_passes(cfg, row)
    phases = programs.trace_all(cfg, policy, state, passes, row)
    assert list(phases) == ["encode", "embed", "logps", "update"]
    assert phases["encode"].inputs.shape == (64, 224, 420, 3)
    batch = phases["update"].inputs[0]
    assert batch.rope_pos.shape == (*batch.tokens.shape, 3)
    assert batch.features.shape[-1] == 2048
