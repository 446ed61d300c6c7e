"""Times of clips, stories and reasonings are those at which a viewer sees the frames."""

import base64
import io
from fractions import Fraction

import av
import clips
import generation
import numpy as np
import pytest
from chat_server import ChatServer
from PIL import Image

from longrl_jax.data import video
from longrl_jax.data.generate import caption, clock, merge, run, settings, split


@pytest.mark.parametrize(
    ("end_s", "clip_s", "min_clip_s", "wanted"),
    [
        (30.0, 10, 5, [[0, 10], [10, 20], [20, 30]]),
        (25.0, 10, 5, [[0, 10], [10, 20], [20, 25]]),  # half a clip is one of its own
        (24.9, 10, 5, [[0, 10], [10, 24.9]]),  # a shorter rest belongs to the one before
        (30.0004, 10, 0, [[0, 10], [10, 20], [20, 30]]),  # the rounding of a container is no clip
        (3.2, 10, 5, [[0, 3.2]]),
        (10.0, 10, 10, [[0, 10]]),
        (7.5, 2.5, 0, [[0, 2.5], [2.5, 5], [5, 7.5]]),
    ],
)
def test_windows(end_s, clip_s, min_clip_s, wanted):
    got = split.windows(end_s, clip_s=clip_s, min_clip_s=min_clip_s)
    np.testing.assert_allclose(np.array(got), wanted, atol=1e-3)


def test_windows_of_an_hour_cover_it_once():
    got = split.windows(3601.7, clip_s=10, min_clip_s=5)
    assert len(got) == 360 and got[0][0] == 0 and got[-1] == [3590, 3601.7]
    assert all(before[1] == after[0] for before, after in zip(got[:-1], got[1:], strict=True))


@pytest.mark.parametrize(
    ("time_s", "told"), [(0, "0:00"), (9.99, "0:09"), (65, "1:05"), (3725.2, "1:02:05")]
)
def test_the_clock_tells_times_and_reads_them(time_s, told):
    assert clock.told(time_s) == told
    assert clock.seconds(told) == int(time_s)


def test_a_span_is_told_by_whole_seconds_that_hold_it():
    assert clock.span(590, 600) == "[9:50 - 10:00]"
    assert clock.span(12.4, 14.5) == "[0:12 - 0:15]"
    assert clock.span(0, 0.1) == "[0:00 - 0:01]"
    assert clock.span(20, 30.03) == "[0:20 - 0:30]"


@pytest.mark.parametrize("text", ["", "ten", "1:75", "0:10 - 0:20", "-3"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is no time"):
        clock.seconds(text)


UNEVEN_S = [*np.arange(0, 4, 0.1), *np.arange(4, 13, 3), *np.arange(13, 26, 0.5)]
"""Ten frames a second, then one in three seconds, then two a second."""


def late_film(path, *, offset_s):
    """Writes 26 s of two frames a second whose first frame is shown at offset_s."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=2, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.time_base = clips.TICK
        for i in range(52):
            frame = av.VideoFrame.from_ndarray(clips.picture(i, size=(64, 96)), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts = round((offset_s + Fraction(i, 2)) / clips.TICK)
            frame.time_base = clips.TICK
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def films(folder):
    """name -> (film, when its frames are shown)."""
    even_s = np.arange(52) / 2
    return {
        "uneven": (
            clips.make(folder / "uneven.mp4", times_s=UNEVEN_S, num_frames=len(UNEVEN_S)),
            UNEVEN_S,
        ),
        "late.mkv": (late_film(folder / "late.mkv", offset_s=5), even_s),
        "late.mp4": (late_film(folder / "late.mp4", offset_s=5), even_s),
        "turned": (clips.make(folder / "turned.mp4", num_frames=52, fps=2, rotation=90), even_s),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return films(tmp_path_factory.mktemp("films"))


@pytest.mark.parametrize("name", ["uneven", "late.mkv", "late.mp4", "turned"])
def test_a_timeline_counts_from_the_first_frame(name, made):
    path, starts_s = made[name]
    got = video.timeline(path)
    np.testing.assert_allclose(got.starts_s, starts_s, atol=2e-3)
    assert starts_s[-1] < got.end_s <= starts_s[-1] + 3
    assert (got.height, got.width) == ((96, 64) if name == "turned" else (64, 96))


@pytest.mark.parametrize("name", ["uneven", "late.mkv", "late.mp4"])
def test_a_clip_shows_the_frames_of_its_time(name, made):
    """Witness: the last frame that starts by a time, counted in a loop; frames are numbered."""
    path, starts_s = made[name]
    end_s = video.timeline(path).end_s
    about = {"height": 64, "width": 96, "film": path.name}
    windows = split.windows(end_s, clip_s=8, min_clip_s=4)
    cfg = settings.CaptionConfig(server="any", frames=4)
    with video.DecoderPool(2, timeout_s=60) as pool:
        got = caption.clip_frames(path, about, windows, cfg, pool)
    for (start_s, stop_s), frames in zip(windows, got, strict=True):
        for k, number in enumerate(clips.numbers(frames)):
            wish_s = start_s + (stop_s - start_s) * k / 4
            assert number == max(i for i, s in enumerate(starts_s) if s <= wish_s + 1e-3)


def test_captions_and_stories_tell_the_film_s_own_time(tmp_path):
    """A factor of ten here (Long-RL's step 3) would shift every reasoning that quotes a time."""
    with ChatServer(generation.answer) as server:
        cfg = settings.load(generation.make(tmp_path, server.base_url, films=1), [])
        for name in ("split", "caption", "merge"):
            run.run_stage(cfg, name, ["film 0.mp4"])
        asked = [x for x in server.asked if "0:20 to 0:30" in x.text]
        assert len(asked) == 1 and "0:20\n" in asked[0].text and "0:25" in asked[0].text
        parts = asked[0].body["messages"][0]["content"]
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    data = [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in pictures]
    frames = [np.asarray(Image.open(io.BytesIO(x))) for x in data]
    assert clips.numbers(frames) == [40, 50]  # two frames a second: those of 20 s and 25 s
    story = run.work_of(cfg, "merge", "film 0.mp4").items[0]["story"]
    wanted = [f"[0:{10 * k:02} - {clock.told(10 * k + 10)}] " for k in range(5)]
    assert story.splitlines() == [
        head + said.lower() for head, said in zip(wanted, generation.CAPTIONS.values(), strict=True)
    ]


def test_a_story_that_is_too_long_is_condensed_level_by_level(tmp_path):
    """An hour, 360 clips; every condensed note lies where its captions do, and it fits."""
    lines = [
        {"start_s": 10.0 * i, "end_s": 10.0 * i + 10, "text": "red left. red middle. nobody."}
        for i in range(360)
    ]
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        cfg = settings.load(path, ["merge.story_tokens=700", "merge.max_tokens=1000"])
        steps = merge.steps("film", lines, cfg)
        requests = next(steps)
        while True:
            try:
                replies = run.chat.ask(requests, cfg.servers["all"], journal=None)
                requests = steps.send(replies)
            except StopIteration as stop:
                items, rejects = stop.value
                break
    assert not rejects and items[0]["levels"] > 1
    assert merge.num_tokens(items[0]["story"]) <= 700
    told = items[0]["lines"]
    assert told[0]["start_s"] == 0 and told[-1]["end_s"] == 3600
    assert all(x["end_s"] == y["start_s"] for x, y in zip(told[:-1], told[1:], strict=True))
