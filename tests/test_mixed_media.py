"""A batch of questions about anything: each is answered as if it were alone, in both families."""

import dataclasses
import functools
import types
from pathlib import Path

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longrl_jax import config, convert, encode, models, step
from longrl_jax.batching import make_batch
from longrl_jax.data import image, prompts, video
from longrl_jax.sharding import make_mesh
from longrl_jax.stages.policy import media_layout
from longrl_jax.types import Example, MediaFile, Rollout, Sample
from rollout_bridge.video_cache import VideoStore

ROOT = Path(__file__).parents[1]
FEATURE_RTOL = 1e-5  # of the largest number, float32: other batch sizes add in another order
LOGP_ATOL = 2e-5  # float32 through 4 layers: rows of another length sum in other tiles
CHUNK_FRAMES = 16
LONG, SHORT = 60, 7
"""Frames of the two films: several chunks, and less than one."""
FAMILIES = {
    "vila": {},
    "qwen2_5_vl": {
        "min_pixels": 4 * 784,
        "max_pixels": 8 * 784,
        "image_min_pixels": 2 * 784,
        "image_max_pixels": 12 * 784,
    },
}
IMAGE, VIDEO = (functools.partial(MediaFile, kind=kind) for kind in ("image", "video"))
QUESTIONS = {
    "text only": ("what is two and two ?", ()),
    "an image": ("what colour is it ?", (IMAGE(path="wide.png"),)),
    "images in the words": (
        "is this  or this  larger than  ?",
        (IMAGE(path="wide.png", at=8), IMAGE(path="tall.png", at=17), IMAGE(path="s.png", at=30)),
    ),
    "a long film": ("what happens ?", (VIDEO(path="long.mp4"),)),
    "two films": ("which is longer ?", (VIDEO(path="short.mp4"), VIDEO(path="long.mp4"))),
    "an image and a film": (
        "is it in the film ?",
        (IMAGE(path="tall.png"), VIDEO(path="short.mp4")),
    ),
    "the same twice": ("are they equal ?", (IMAGE(path="s.png"), IMAGE(path="s.png"))),
}


def example_of(name) -> Example:
    question, media = QUESTIONS[name]
    return Example(id=name, question=question, answer="A", media=media)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    clips.make(folder / "long.mp4", num_frames=LONG, size=(64, 96))
    clips.make(folder / "short.mp4", num_frames=SHORT, size=(96, 64))
    rng = np.random.default_rng(0)
    for name, size in {"wide": (50, 120), "tall": (130, 60), "s": (40, 40)}.items():
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        image.write_png(folder / f"{name}.png", picture)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory, files):
    """A tiny random checkpoint, its prompts, and its tower on two devices."""
    folder = tmp_path_factory.mktemp(request.param) / "init"
    convert.init(ROOT / f"configs/models/tiny_{request.param}.json", folder)
    cfg, model = models.load(folder)
    backbone = models.backbone_of(folder)
    tokenizer = prompts.load_tokenizer(models.llm_folder(folder))
    data = config.DataConfig(root="x", **FAMILIES[request.param])
    asked = {
        name: prompts.encode_prompt(
            example_of(name), tokenizer=tokenizer, layout=media_layout(backbone, cfg, data),
            num_frames=LONG, fps=10.0, decoder="pyav", template="direct", root=files,
        )
        for name in QUESTIONS
    }  # fmt: skip
    frozen_parts = ("vision", "projector")
    graphdef, frozen, trained = nnx.split(model, lambda path, x: path[0] in frozen_parts, ...)
    encoder = encode.make_encoder(
        graphdef, frozen, trained, stage="projected", width=cfg.text.width, dtype=jnp.float32,
        mesh=make_mesh(seq=2, devices=jax.devices()[:2]), digest="w", chunk_frames=CHUNK_FRAMES,
    )  # fmt: skip
    return types.SimpleNamespace(
        family=request.param, model=model, tokenizer=tokenizer, asked=asked, encoder=encoder
    )


@pytest.fixture(scope="module")
def together(world, tmp_path_factory):
    """{question: its features}, where all were asked at once; and what was counted."""
    store = VideoStore(tmp_path_factory.mktemp("all") / "store", 2**30)
    counts = dict.fromkeys(encode.COUNTERS, 0)

    def count(name, frames):
        counts[name] += frames

    calls = []

    def run(frames, view):
        calls.append(len(frames))
        return world.encoder.encode(frames, view)

    encoder = dataclasses.replace(world.encoder, encode=run)
    with video.DecoderPool(2, timeout_s=60) as pool:
        found, refused = encode.embed(
            encoder, list(world.asked.values()), store, pool, decoder="pyav", count=count
        )
    assert not refused
    rows = {n: encode.features_of(prompt, found) for n, prompt in world.asked.items()}
    yield types.SimpleNamespace(rows=rows, counts=counts, calls=calls)
    store.close()


@pytest.mark.parametrize("name", [name for name in QUESTIONS if QUESTIONS[name][1]])
def test_features_are_those_of_the_question_alone(world, together, tmp_path, name):
    store = VideoStore(tmp_path / "store", 2**30)
    with video.DecoderPool(1, timeout_s=60) as pool:
        found, refused = encode.embed(
            world.encoder, [world.asked[name]], store, pool, decoder="pyav"
        )
        alone = np.array(encode.features_of(world.asked[name], found))
    store.close()
    assert not refused and alone.shape == (world.asked[name].is_media.sum(), alone.shape[1])
    atol = FEATURE_RTOL * np.abs(alone).max()
    np.testing.assert_allclose(together.rows[name], alone, rtol=0, atol=atol)


@pytest.mark.slow
def test_features_are_those_of_the_model_on_the_pictures_themselves(world, together):
    """No store, no chunks, no mesh: the tower on what the reader says of every file."""
    run = nnx.jit(lambda model, frames: model.encode(frames, stage="projected"))
    for name, prompt in world.asked.items():
        used = 0
        for medium in prompt.media:
            (frames,) = video.read_frames(encode.job_of(medium, "pyav"), chunk=LONG)
            want = run(world.model, frames)
            got = together.rows[name][used : used + medium.num_tokens]
            want = np.asarray(want).reshape(got.shape)
            np.testing.assert_allclose(got, want, rtol=0, atol=FEATURE_RTOL * np.abs(want).max())
            used += medium.num_tokens


def test_every_file_is_decoded_once_however_many_ask(world, together):
    """Three pictures and two films; units of Qwen2.5-VL are two frames: of the 7 the last twice."""
    frames = 3 + LONG + SHORT if world.family == "vila" else 3 * 2 + LONG + SHORT + 1
    assert set(together.counts.values()) == {frames}
    # 60 frames in chunks of 16, the short film in one of 8; pictures of one view in one call
    views = {m.view for prompt in world.asked.values() for m in prompt.media if m.kind == "image"}
    assert len(views) == (1 if world.family == "vila" else 3)
    assert sorted(together.calls) == [8] * (len(views) + 1) + [16] * 4


def test_media_stand_where_the_question_says(world):
    """The text without media tokens is the question, cut at the places of the media."""
    for prompt in world.asked.values():
        example = prompt.example
        assert [m.kind for m in prompt.media] == [file.kind for file in example.media]
        assert [Path(m.path).name for m in prompt.media] == [f.path for f in example.media]
        for medium, file in zip(prompt.media, example.media, strict=True):
            before, of_media = prompt.tokens[: medium.offset], prompt.is_media[: medium.offset]
            said = world.tokenizer.decode(before[~of_media])
            said = said.partition("user\n")[2].replace("<|vision_start|>", "")
            said = said.replace("<|vision_end|>", "").replace("\n", "")
            assert said == example.question[: file.at]
            (token,) = world.tokenizer.convert_ids_to_tokens([int(prompt.tokens[medium.offset])])
            assert medium.kind in token and prompt.is_media[medium.offset]


def rollout_of(prompt, seed) -> Rollout:
    """Two answers of random words."""
    rng = np.random.default_rng(seed)
    samples = [
        Sample(
            tokens=rng.integers(8, 200, length).astype(np.int32),
            logps=np.zeros(length, np.float32),
            finish_reason="stop",
            seed=0,
        )
        for length in (5, 3)
    ]
    return Rollout(prompt=prompt, samples=tuple(samples), policy_version=0)


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_question_alone(world, together):
    """All groups packed two a row, against each in a row of its own, without the others."""
    rollouts = {n: rollout_of(prompt, i) for i, (n, prompt) in enumerate(world.asked.items())}
    graphdef, params = nnx.split(world.model)
    token_logps = jax.jit(
        step.make_token_logps(
            graphdef, temperature=0.7, stage="projected",
            banned_tokens=prompts.media_token_ids(world.tokenizer),
        )
    )  # fmt: skip

    def logps(names, rows=together.rows, **layout):
        batch, index = make_batch(
            [rollouts[name] for name in names], features=[rows[name] for name in names],
            advantages=[np.zeros(2, np.float32)] * len(names), num_shards=1, smallest_bucket=256,
            max_row_tokens=4096, **layout,
        )  # fmt: skip
        found = index.per_sample(np.asarray(token_logps(params, batch)[0]))
        return {name: np.concatenate(x) for name, x in zip(names, found, strict=True)}

    mixed = logps(list(QUESTIONS), num_rows=4, groups_per_row=2)
    for name in QUESTIONS:
        alone = logps([name], num_rows=1)[name]
        assert len(alone) == 8 and np.isfinite(alone).all()
        np.testing.assert_allclose(mixed[name], alone, rtol=0, atol=LOGP_ATOL, err_msg=name)
    # each place has its own medium: the same rows in another order say something else
    name = "images in the words"
    other = logps([name], {name: together.rows[name][::-1]}, num_rows=1)[name]
    assert np.abs(other - mixed[name]).max() > 10 * LOGP_ATOL
