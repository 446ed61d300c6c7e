"""Videos become stored embeddings once, over 8 devices, and a bad one leaves nothing behind."""

import dataclasses
import functools

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longrl_jax import encode
from longrl_jax.data import image, video
from longrl_jax.metrics import Phases
from longrl_jax.models import decoder, projector, s2, siglip, vila
from longrl_jax.models.rope import Rope
from longrl_jax.sharding import make_mesh
from longrl_jax.types import Example, Media, Prompt, View
from rollout_bridge.video_cache import VideoStore

CFG = vila.Config(
    text=decoder.Config(
        vocab_size=16,
        width=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_width=32,
        norm_eps=1e-6,
        rope=Rope(theta=1e4),
        tied=True,
    ),
    vision=siglip.Config(
        image_size=32,
        patch_size=8,
        num_channels=3,
        width=16,
        num_layers=2,
        num_heads=2,
        mlp_width=32,
        norm_eps=1e-6,
    ),
    projector=projector.Config(kind="mlp_downsample_2x2_fix", width_in=16, width_out=24),
    num_vision_layers=1,
    vision_prefix="",
)
VIEW = View(size=(32, 32), grid=(2, 2))
TOKENS = 4  # of one frame: 4 x 4 patches, 2 x 2 side by side
LONG = 130
HOUR = 3599
"""Frames at one a second but one: neither the devices nor the chunks divide it."""
RTOL = 1e-6
"""Of the largest number, float32: devices get other batch sizes, so sums may be ordered anew."""


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: vila.Model(CFG, rngs=nnx.Rngs(0)))()


@functools.cache
def mesh_of(seq: int, tensor: int = 1):
    return make_mesh(seq=seq, tensor=tensor, devices=jax.devices()[: seq * tensor])


def make_encoder(model, *, stage="packed", mesh=None, weights_digest="w0", chunk_frames=16):
    parts = ("vision",) if stage == "packed" else ("vision", "projector")
    graphdef, frozen, trained = nnx.split(model, lambda path, x: path[0] in parts, ...)
    return encode.make_encoder(
        graphdef,
        frozen,
        trained,
        stage=stage,
        width=vila.feature_width(CFG, stage),
        dtype=jnp.float32,
        mesh=mesh or mesh_of(8),
        digest=weights_digest,
        chunk_frames=chunk_frames,
    )


@pytest.fixture(scope="module")
def encoder(model):
    return make_encoder(model)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return clips.make(tmp_path_factory.mktemp("films") / "film.mp4", num_frames=LONG)


@pytest.fixture(scope="module")
def pool():
    with video.DecoderPool(2, timeout_s=60) as pool:
        yield pool


@pytest.fixture
def store(tmp_path):
    store = VideoStore(tmp_path / "store", 2**30)
    yield store
    store.close()


def medium(path, num_frames, *, key=None, offset=0):
    return Media(
        kind="video",
        path=str(path),
        key=key or f"{path}:{num_frames}",
        grid=(num_frames, 2, 2),
        times_s=tuple(i / 10 for i in range(num_frames)),
        view=VIEW,
        num_tokens=TOKENS * num_frames,
        offset=offset,
    )


def prompt_of(*media):
    length = sum(m.num_tokens for m in media) + 2
    return Prompt(
        example=Example(id="q", question="what?", answer="A"),
        tokens=np.zeros(length, np.int32),
        is_media=np.arange(length) < length - 2,
        rope_pos=np.arange(length, dtype=np.int32),
        next_rope_pos=length,
        media=media,
    )


@pytest.fixture(scope="module")
def wanted(model, film):
    """num_frames, stage -> what one device makes of the film's first frames."""
    rows = one_device(model, medium(film, LONG))

    def of(num_frames, stage="packed"):
        return rows[stage][: num_frames * TOKENS]

    return of


def one_device(model, m):
    """{stage: rows of a medium}: no chunks, padding or mesh."""
    (frames,) = video.read_frames(encode.job_of(m, "pyav"), chunk=m.grid[0])
    run = nnx.jit(lambda model, x: [model.encode(x, stage=stage) for stage in vila.STAGES])
    rows = [np.asarray(x).reshape(m.num_tokens, -1) for x in run(model, frames)]
    # frames differ, so that an exchange of two would be seen
    assert len(np.unique(rows[0].reshape(m.grid[0], -1), axis=0)) == m.grid[0]
    return dict(zip(vila.STAGES, rows, strict=True))


def assert_close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL * np.abs(want).max())


def files(store):
    return sorted(path.suffix for path in store.path.iterdir() if path.name != "lock")


def counted(encoder):
    """Returns the encoder and a list that grows with every call of the tower."""
    calls = []

    def run(frames, view):
        calls.append(len(frames))
        return encoder.encode(frames, view)

    return dataclasses.replace(encoder, encode=run), calls


@pytest.mark.parametrize("num_frames", [1, 7, 9, LONG])
@pytest.mark.parametrize("chunk_frames", [16, 64])
def test_eight_devices_equal_one(model, wanted, film, store, pool, num_frames, chunk_frames):
    m = medium(film, num_frames)
    eight = make_encoder(model, chunk_frames=chunk_frames)
    got, refused = encode.embed(eight, [prompt_of(m)], store, pool, decoder="pyav")
    assert not refused
    assert_close(got[m.key], wanted(num_frames))


def test_an_hour_beside_a_short_film_equals_one_device(model, film, store, pool, tmp_path):
    hour = medium(clips.make(tmp_path / "hour.mp4", num_frames=HOUR, size=(32, 32)), HOUR)
    short = medium(film, 9)
    eight, calls = counted(make_encoder(model, chunk_frames=encode.CHUNK_FRAMES))
    prompts = [prompt_of(hour), prompt_of(short)]
    got, refused = encode.embed(eight, prompts, store, pool, decoder="pyav")
    assert not refused
    for m in (hour, short):
        assert_close(got[m.key], one_device(model, m)["packed"])
    assert calls == [64] * (57 + 1)  # ceil(3,599 / 64), and the 9: no chunk holds frames of both


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_two_videos_of_unlike_length_and_a_text_only_prompt(
    encoder, wanted, film, store, pool, decoder
):
    short = medium(film, 5)
    long = dataclasses.replace(medium(film, 40), offset=short.num_tokens)
    prompts = [prompt_of(short, long), prompt_of(), prompt_of(long)]
    features, refused = encode.embed(encoder, prompts, store, pool, decoder=decoder)
    assert not refused and set(features) == {short.key, long.key}
    both = np.concatenate([wanted(5), wanted(40)])
    assert_close(encode.features_of(prompts[0], features), both)
    assert encode.features_of(prompts[1], features) is None
    assert_close(encode.features_of(prompts[2], features), wanted(40))


def test_the_projected_stage(model, wanted, film, store, pool):
    m = medium(film, 9)
    encoder = make_encoder(model, stage="projected")
    got, _ = encode.embed(encoder, [prompt_of(m)], store, pool, decoder="pyav")
    assert got[m.key].shape == (36, CFG.text.width)
    assert_close(got[m.key], wanted(9, "projected"))


def test_padding_does_not_reach_the_frames_beside_it(encoder):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (encoder.chunk_sizes(VIEW)[-1], 32, 32, 3), dtype=np.uint8)
    other = frames.copy()
    other[5:] = rng.integers(0, 256, other[5:].shape, dtype=np.uint8)
    a, b = (np.asarray(encoder.encode(x, VIEW)) for x in (frames, other))
    np.testing.assert_array_equal(a[:5], b[:5])
    assert np.abs(a[5:] - b[5:]).max() > 0


@pytest.mark.parametrize("num_frames", [1, 9, 13, 16])
def test_padding_leaves_no_device(model, num_frames):
    encoder = make_encoder(model, mesh=mesh_of(4, 2), chunk_frames=16)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (num_frames, 32, 32, 3), dtype=np.uint8)
    whole, gone = [], []

    def run(padded, view):
        whole.append(np.array(encoder.encode(padded, view)))
        output = encoder.encode(padded, view)
        for part in output.addressable_shards:  # one of the two copies on axis tensor is enough
            if part.index[0].start >= num_frames or part.replica_id:
                part.data.delete()
                gone.append(part.device)
        return output

    got = encode.encode_chunk(dataclasses.replace(encoder, encode=run), frames, VIEW)
    with_a_frame = {1: 1, 9: 3, 13: 4, 16: 4}  # of 4 places with 2 (of 8 frames) or 4 frames (16)
    assert len(gone) == 8 - with_a_frame[num_frames]
    assert_close(got, whole[0][:num_frames].reshape(num_frames * TOKENS, -1))


def test_frames_are_split_over_all_devices(model, encoder):
    assert encoder.chunk_sizes(VIEW) == (8, 16)
    for size in (8, 16):
        parts = encoder.encode(np.zeros((size, 32, 32, 3), np.uint8), VIEW).addressable_shards
        assert len({part.device for part in parts}) == 8
        assert {part.data.shape[0] for part in parts} == {size // 8}
    assert make_encoder(model, chunk_frames=10).chunk_sizes(VIEW) == (8, 16)
    assert make_encoder(model, chunk_frames=3).chunk_sizes(VIEW) == (8,)
    assert make_encoder(model, mesh=mesh_of(4, 2), chunk_frames=10).chunk_sizes(VIEW) == (8, 12)
    assert make_encoder(model, mesh=mesh_of(3), chunk_frames=64).chunk_sizes(VIEW) == (9, 66)


def test_chunks_hold_whole_pools_and_count_what_the_tower_sees(model):
    """LongVILA-R1's longest pool; a frame at three scales, 14 pictures."""
    pooled = dataclasses.replace(VIEW, unit_frames=32, pools=((32, 1, 1),))
    one, eight = (make_encoder(model, mesh=mesh_of(n), chunk_frames=64) for n in (1, 8))
    assert one.chunk_sizes(pooled) == (32, 64) and eight.chunk_sizes(pooled) == (256,)
    assert one.chunk_sizes(dataclasses.replace(VIEW, cost=14)) == (4,)


@pytest.mark.slow
def test_tiles_of_images_are_joined_alike_on_one_device_and_on_eight():
    scales = s2.Scales(sizes=(32, 64), tile=32, output=1, dynamic=True)
    wide = dataclasses.replace(CFG.projector, width_in=32)
    cfg = dataclasses.replace(CFG, scales=scales, projector=wide, image_aspect="dynamic_s2")
    model = nnx.jit(lambda: vila.Model(cfg, rngs=nnx.Rngs(0)))()
    view = vila.image_view(cfg, 300, 500)
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (view.inputs, 32, 32, 3), dtype=np.uint8)
    one, eight = (
        encode.encode_chunk(make_encoder(model, mesh=mesh_of(n), chunk_frames=8), tiles, view)
        for n in (1, 8)
    )
    assert one.shape == (np.prod(view.grid), vila.feature_width(cfg, "packed"))
    assert_close(eight, one)


@pytest.mark.parametrize("num_tiles", (3, 5, 20))
def test_tiles_that_stand_alone_are_encoded_however_many_wait(
    encoder, store, pool, tmp_path, num_tiles
):
    """More than a call of the tower takes (16), of several images or of one."""
    view = dataclasses.replace(VIEW, scales=((32, 32 * num_tiles),))
    rng, images, want = np.random.default_rng(0), [], {}
    for i in range(9):
        picture = rng.integers(0, 256, (32, 32 * num_tiles, 3), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        image.write_png(path, picture)
        made = medium(path, num_tiles)
        images.append(dataclasses.replace(made, kind="image", view=view))
        want[made.key] = np.concatenate(
            [encode.encode_chunk(encoder, x[None], VIEW) for x in np.split(picture, num_tiles, 1)]
        )
    prompts = [prompt_of(m) for m in images]
    got, refused = encode.embed(encoder, prompts, store, pool, decoder="pyav")
    assert not refused and set(got) == set(want)
    for key, rows in got.items():
        assert_close(rows, want[key])


def test_films_of_every_length_need_two_programs(model, wanted, film, store, pool, caplog):
    media = [medium(film, num_frames) for num_frames in (1, 8, 9, 64, 70)]
    encoder, calls = counted(make_encoder(model, chunk_frames=encode.CHUNK_FRAMES))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for m in media:
            got, _ = encode.embed(encoder, [prompt_of(m)], store, pool, decoder="pyav")
            assert_close(got[m.key], wanted(m.grid[0]))
    assert calls == [8, 8, 64, 64, 64, 8]  # 70 = 64 + 6
    compiled = [r for r in caplog.records if r.getMessage().startswith("Compiling jit(run)")]
    assert len(compiled) == 2


def test_a_second_call_is_a_hit_and_decodes_nothing(encoder, film, store, pool, tmp_path):
    path = clips.cut(film, tmp_path / "gone.mp4", part=1)
    prompts = [prompt_of(medium(path, 20)), prompt_of(medium(path, 20))]
    encoder, calls = counted(encoder)
    first, _ = encode.embed(encoder, prompts, store, pool, decoder="pyav")
    assert calls == [16, 8]  # 20 frames; asked for twice, encoded once
    want = {key: np.array(value) for key, value in first.items()}
    path.unlink()
    for again in (store, VideoStore(store.path, 2**30)):  # the second as in the next run
        got, refused = encode.embed(encoder, prompts, again, pool, decoder="pyav")
        assert not refused and len(calls) == 2
        np.testing.assert_array_equal(*[next(iter(x.values())) for x in (got, want)])


def test_other_weights_or_another_stage_are_no_hit(model, encoder, film, store, pool):
    m = medium(film, 3)
    encode.embed(encoder, [prompt_of(m)], store, pool, decoder="pyav")
    other = [make_encoder(model, weights_digest="w1"), make_encoder(model, stage="projected")]
    for changed in other:
        changed, calls = counted(changed)
        encode.embed(changed, [prompt_of(m)], store, pool, decoder="pyav")
        assert len(calls) == 1
    assert files(store) == [".emb"] * 3


def test_a_refused_video_is_reported_by_its_key_and_leaves_no_entry(
    encoder, film, store, pool, tmp_path
):
    good, bad = medium(film, 20), medium(tmp_path / "nowhere.mp4", 20)
    prompts = [prompt_of(bad), prompt_of(good)]
    features, refused = encode.embed(encoder, prompts, store, pool, decoder="pyav")
    assert set(features) == {good.key} and set(refused) == {bad.key}
    assert refused[bad.key].kind == "missing"
    assert files(store) == [".emb"]


def test_a_half_read_video_leaves_no_entry(encoder, film, store, pool, tmp_path):
    fast = clips.make(tmp_path / "fast.mp4", num_frames=LONG, faststart=True)
    half = medium(clips.cut(fast, tmp_path / "half.mp4", part=0.6), 120)
    encoder, calls = counted(encoder)
    features, refused = encode.embed(encoder, [prompt_of(half)], store, pool, decoder="pyav")
    assert calls, "part of it should have been encoded"
    assert not features and refused[half.key].kind == "truncated"
    assert files(store) == []


def test_an_error_of_the_encoder_leaves_no_half_entry(encoder, film, store, pool):
    calls = []

    def run(frames, view):
        calls.append(len(frames))
        if len(calls) == 3:
            raise FloatingPointError("out of luck")
        return encoder.encode(frames, view)

    broken = dataclasses.replace(encoder, encode=run)
    m = medium(film, LONG)
    with pytest.raises(FloatingPointError):
        encode.embed(broken, [prompt_of(m)], store, pool, decoder="pyav")
    assert files(store) == []
    got, _ = encode.embed(encoder, [prompt_of(m)], store, pool, decoder="pyav")  # all still works
    assert len(got[m.key]) == TOKENS * LONG


def test_the_clock_is_told_of_both_phases(encoder, film, store, pool):
    seconds = {"decode": 0.0, "encode": 0.0}

    def add(phase, value):
        assert value >= 0
        seconds[phase] += value

    encode.embed(encoder, [prompt_of(medium(film, 40))], store, pool, decoder="pyav", clock=add)
    assert seconds["decode"] > 0 and seconds["encode"] > 0


def test_frames_are_counted_where_they_are_decoded_and_encoded(encoder, film, store, pool):
    """Two films of 20 and 9 frames, asked for three times in all; then the store has both."""
    encoder, calls = counted(encoder)
    prompts = [prompt_of(medium(film, n)) for n in (20, 9, 20)]
    phases = Phases()
    for expected in (29, 0):
        encode.embed(encoder, prompts, store, pool, decoder="pyav", count=phases.count)
        counts = phases.take()
        assert [counts[counter] for counter in encode.COUNTERS] == [expected] * 2
    assert sum(calls) == 16 + 16 + 8  # 20 = 16 + 4, 9: a call takes 8 or 16, padding included
