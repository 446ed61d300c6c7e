"""Subtitles: what files say, and which lines a prompt shows, as the public code has it."""

import json
from pathlib import Path

import numpy as np
import pytest

from longrl_jax.data import subtitles
from longrl_jax.data.subtitles import Line, SubtitleError, between, exchanged, read, shown
from longrl_jax.types import Example

WITNESS = json.loads((Path(__file__).parents[1] / "witness" / "scorers.json").read_text())
SRT = "1\n00:00:01,000 --> 00:00:02,500\nHello\n\n2\n00:01:00,000 --> 01:00:00,000\nyou\nall\n"
VTT = (
    "WEBVTT\n\n00:01.000 --> 00:02.500\n<v Bob>Hello\n\nNOTE no line\n\n"
    "00:01:00.000 --> 01:00:00.000\nyou\nall &amp; me\n"
)
LINES = (Line(1.0, 2.5, "Hello"), Line(60.0, 3600.0, "you all"))


def written(folder, content, name="film.srt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_at_sampled_times_are_those_of_lmms_eval(tmp_path):
    made = WITNESS["video_mme_subtitles"]
    lines = read(written(tmp_path, made["srt"]))
    assert len(lines) == 7
    for num_frames, want in made["shown"].items():
        frames = np.linspace(0, made["frame_ms"] - 1, int(num_frames), dtype=int)
        assert shown(lines, [frame / 1000 for frame in frames]) == [x for x in want if x]
    assert {len(want) for want in made["shown"].values()} == {1, 4, 5}


def test_lines_between_frames_are_those_of_longvideobench(tmp_path):
    for number, made in enumerate(WITNESS["longvideobench_subtitles"]):
        path = written(tmp_path, json.dumps(made["lines"]), f"{number}.json")
        lines = read(path, start_s=made["from_s"], length_s=made["length_s"])
        placed, text = dict.fromkeys(range(len(made["times_s"]) + 1), ""), ""
        for before, line in between(lines, made["times_s"]):
            placed[before] += f"{line}\n"
        for before, said in placed.items():
            text += ("<image>\n" if before else "") + said
        assert text.rstrip("\n") == made["text"]


@pytest.mark.parametrize(
    "content",
    [
        SRT,
        SRT.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + SRT.encode(),
        SRT.replace("Hello", '<font color="white" size=".72c">Hello</font>'),
        SRT.replace("Hello", "<i>Hel</i>lo <b></b>"),
        SRT.rstrip("\n"),
    ],
    ids=["plain", "CRLF", "BOM", "font", "markup", "no end"],
)
def test_an_srt_file_is_read(tmp_path, content):
    assert read(written(tmp_path, content)) == LINES


def test_a_vtt_file_is_read(tmp_path):
    assert read(written(tmp_path, VTT, "film.vtt")) == (LINES[0], Line(60, 3600, "you all & me"))


def test_lines_overlap_leave_gaps_and_end_before_their_end():
    lines = [Line(0, 2, "a"), Line(1, 3, "b"), Line(5, 6, "c"), Line(6, 6, "never")]
    assert shown(lines, [0]) == ["a"]
    assert shown(lines, [1.5, 1.9]) == ["a", "b"]
    assert shown(lines, [2, 4, 6]) == ["b"]
    assert shown(lines, []) == shown([], [1]) == []
    assert between(lines, [0, 1, 2, 5.5]) == [(2, "a"), (3, "b"), (4, "c")]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("film.srt", b"\xff\xfe\x00", "no text in UTF-8"),
        ("film.srt", "garbage\nof some lines", "holds no subtitles in the form of srt"),
        ("film.vtt", "WEBVTT\n\nnothing", "holds no subtitles in the form of vtt"),
        ("film.srt", "1\n00:00:02,000 --> 00:00:01,000\nback\n", "'back' ends before it starts"),
        ("film.txt", SRT, r"must end in .srt, .vtt or .json"),
        ("film.json", "{", "is not JSON"),
        ("film.json", "[" * 100_000, "is not JSON"),
        ("film.json", "{}", "must be a list"),
        ("film.json", '[{"start": "0:0:1", "end": "0:0:2"}]', r"\[0\].*no 'line'"),
        ("film.json", '[{"start": "0:1", "end": "0:2", "line": "x"}]', r"\[0\].*no subtitle"),
        ("film.json", '[{"timestamp": [2, 1], "text": "x"}]', "lasts from 2.0 to 1.0 s"),
        ("film.json", '[{"timestamp": [NaN, 1], "text": "x"}]', "lasts from nan"),
        ("film.json", '[{"timestamp": [0, 1], "text": 3}]', "3 is no text"),
        ("film.json", "[3]", r"\[0\]=3 is no subtitle"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, content, why):
    with pytest.raises(SubtitleError, match=f"(?s){name}.*{why}"):
        read(written(tmp_path, content, name))


def test_files_that_are_missing_empty_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(SubtitleError, match="none.srt cannot be read"):
        read(tmp_path / "none.srt")
    assert read(written(tmp_path, "\n", "silent.srt")) == ()
    monkeypatch.setattr(subtitles, "MAX_BYTES", 10)
    with pytest.raises(SubtitleError, match="large.srt is over"):
        read(written(tmp_path, SRT, "large.srt"))


def test_times_count_from_the_start_of_a_film_that_was_cut_out(tmp_path):
    written(tmp_path, SRT)
    tags = (("level", "L1"), (subtitles.START, "58.5"), (subtitles.LENGTH, "20"))
    example = Example(id="q", question="?", answer="A", subtitles="film.srt", tags=tags)
    assert [line.start_s for line in subtitles.of_example(example, tmp_path)] == [-57.5, 1.5]
    assert subtitles.of_example(Example(id="q", question="?", answer="A"), tmp_path) == ()
    other = Example(id="r", question="?", answer="B", tags=(("level", "L2"),))
    swapped = exchanged(example, other)
    assert (swapped.subtitles, swapped.tags) == ("", (("level", "L1"),))
    assert exchanged(other, example).tags == (("level", "L2"), *tags[1:])
    bad = Example(id="q", question="?", answer="A", subtitles="film.srt", tags=((tags[1][0], "x"),))
    with pytest.raises(SubtitleError, match="subtitles_start_s.*must be seconds"):
        subtitles.of_example(bad, tmp_path)
