import functools
import json
import pickle

import published
import pytest

from longrl_jax.config import pick
from longrl_jax.data import SOURCES
from longrl_jax.data.longvideo_reason import RecordError, open_records, to_record
from longrl_jax.types import Example, MediaFile

PLAIN = {"id": "a", "question": "what ?", "answer": "B", "video": "v.mp4"}
PUBLISHED = {  # fields as on the data set's card; the words are ours
    "problem_id": 7,
    "problem": "Why does he run?\nA. rain\nB. a dog",
    "data_type": "video",
    "problem_type": "goal",
    "reasoning": "<think>At 0:10 a dog appears.\nHe runs.</think>",
    "videos": "longvila_videos/x.mp4",
    "answer": "<answer>B</answer>",
}


def write(root, *lines, file="train.jsonl"):
    """Writes lines (dicts as JSON, bytes as they are) and opens them."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    (root / file).write_bytes(b"".join(raw))
    return open_records(root, file)


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


def test_reads_the_published_form(tmp_path):
    want = Example(
        id="7",
        question="Why does he run?\nA. rain\nB. a dog",
        answer="B",
        kind="goal",
        media=(MediaFile(kind="video", path="longvila_videos/x.mp4"),),
        reasoning="At 0:10 a dog appears.\nHe runs.",
    )
    assert write(tmp_path, PUBLISHED)[0] == want


def test_reads_the_plain_form(tmp_path):
    full = PLAIN | {"kind": "plot", "reasoning": "so it is"}
    want = Example(**without(full, "video"), media=(MediaFile(kind="video", path="v.mp4"),))
    assert write(tmp_path, full)[0] == want


def test_tags_and_subtitles_are_read_and_written(tmp_path):
    more = {"tags": {"duration": "long", "domain": "Film"}, "subtitles": "subs/v.srt"}
    example = write(tmp_path, PLAIN | more)[0]
    assert example.tags == (("duration", "long"), ("domain", "Film"))
    assert example.subtitles == "subs/v.srt"
    assert write(tmp_path, to_record(example))[0] == example


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tags", ["long"], "must be an object of texts"),
        ("tags", {"duration": 3}, "must be an object of texts"),
        ("tags", {"duration": "\ud800"}, "must be valid Unicode"),
        ("subtitles", 3, "must be a path"),
        ("subtitles", "../v.srt", "links followed"),
        ("subtitles", "/v.srt", "links followed"),
    ],
)
def test_bad_tags_and_subtitles_are_refused(tmp_path, field, value, said):
    with pytest.raises(RecordError, match=f"train.jsonl:1: {field}=.*{said}"):
        _ = write(tmp_path, PLAIN | {field: value})[0]


def test_a_record_may_be_about_a_part_of_its_video(tmp_path):
    example = write(tmp_path, PLAIN | {"span": [8, 16.5]})[0]
    assert example.media[0].span_s == (8.0, 16.5)
    assert write(tmp_path, to_record(example))[0] == example


def test_parquet_loses_nothing_of_the_plain_form(tmp_path):
    rows = [
        PLAIN
        | {"id": "a", "span": [8.0, 16.5], "tags": {"duration": "long"}, "subtitles": "v.srt"},
        PLAIN | {"id": "b", "tags": {"duration": "short", "domain": "Sport"}},
        PLAIN | {"id": "c"},
    ]
    published.write_parquet(tmp_path, "plain.parquet", rows)
    records, lines = open_records(tmp_path, "plain.parquet"), write(tmp_path, *rows)
    assert [records[i] for i in range(3)] == [lines[i] for i in range(3)]
    assert lines[0].media[0].span_s and lines[0].tags and lines[0].subtitles


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (PLAIN | {"span": [8]}, "span=[8] must be [start, end], in seconds"),
        (PLAIN | {"span": [16, 8]}, "0 <= start < end"),
        (PLAIN | {"span": [-1, 8]}, "0 <= start < end"),
        (PLAIN | {"span": ["0:08", "0:16"]}, "must be [start, end]"),
        (PLAIN | {"span": [False, True]}, "must be [start, end]"),
        (without(PLAIN, "video") | {"span": [8, 16]}, "a part of one video; the record has none"),
        (PLAIN | {"video": ["a.mp4", "b.mp4"], "span": [8, 16]}, "none, or several"),
    ],
)
def test_a_bad_span_is_refused(tmp_path, record, said):
    with pytest.raises(RecordError) as caught:
        write(tmp_path, record)[0]
    assert said in str(caught.value)


@pytest.mark.parametrize("video", [{}, {"video": ""}, {"video": None}])
def test_a_question_may_have_no_video(tmp_path, video):
    assert write(tmp_path, without(PLAIN, "video") | video)[0].about == ""


IMAGE, VIDEO = (functools.partial(MediaFile, kind=kind) for kind in ("image", "video"))
PLACED = {
    "several videos": (
        {"videos": ["a.mp4", "b.mp4"]},
        "which ?",
        [VIDEO(path="a.mp4"), VIDEO(path="b.mp4")],
    ),
    "images stand before videos": (
        {"video": "a.mp4", "images": ["b.png"]},
        "which ?",
        [IMAGE(path="b.png"), VIDEO(path="a.mp4")],
    ),
    "in the words": (
        {"images": ["a.png", "b.png"], "question": "is <image> in\n<image>?"},
        "is  in\n?",
        [IMAGE(path="a.png", at=3), IMAGE(path="b.png", at=7)],
    ),
    "both in the words": (
        {"image": "a.png", "videos": ["b.mp4"], "question": "<video><image>which ?"},
        "which ?",
        [VIDEO(path="b.mp4"), IMAGE(path="a.png")],
    ),
    "at the end": (
        {"image": "a.png", "question": "what is this: <image>"},
        "what is this: ",
        [IMAGE(path="a.png", at=14)],
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_media_stand_where_the_question_says(tmp_path, name):
    fields, question, media = PLACED[name]
    example = write(tmp_path, {"id": "a", "question": "which ?", "answer": "B"} | fields)[0]
    assert (example.question, example.media) == (question, tuple(media))
    assert example.about == " + ".join(file.path for file in media)
    assert write(tmp_path, to_record(example))[0] == example  # and back


@pytest.mark.parametrize(
    ("raw", "field", "value"),
    [
        (" <answer> B </answer>\n", "answer", "B"),
        ("two\nwords", "answer", "two\nwords"),
        ("3 < 4", "answer", "3 < 4"),
        ("<think> so </think>\n<answer>B</answer>", "reasoning", "so"),
        ("no tag at all", "reasoning", "no tag at all"),
    ],
)
def test_tags_are_taken_off(tmp_path, raw, field, value):
    assert getattr(write(tmp_path, PLAIN | {field: raw})[0], field) == value


BAD = {
    "broken JSON": (b'{"id": "a", "question": \n', ["JSON"]),
    "bad UTF-8": (b'{"id": "\xff"}\n', ["JSON"]),
    "endless brackets": (b"[" * 100_000 + b"\n", ["JSON"]),
    "half a character": (PLAIN | {"question": "\ud800 ?"}, [r"question='\ud800 ?'", "Unicode"]),
    "a list": ([1, 2], ["[1, 2]", "object"]),
    "no question": (without(PLAIN, "question"), ["no question", "problem"]),
    "no id": (without(PLAIN, "id"), ["no id", "problem_id"]),
    "no answer": (without(PUBLISHED, "answer"), ["no answer"]),
    "empty question": (PLAIN | {"question": " "}, ["question=' '", "empty"]),
    "empty answer": (PLAIN | {"answer": "<answer> </answer>"}, ["answer='<answer> </answer>'"]),
    "number as answer": (PLAIN | {"answer": 4}, ["answer=4", "text"]),
    "null question": (PLAIN | {"question": None}, ["question=None", "text"]),
    "true as id": (PLAIN | {"id": True}, ["id=True", "whole number"]),
    "half an id": (PLAIN | {"id": 0.5}, ["id=0.5", "whole number"]),
    "number as video": (PLAIN | {"video": 4}, ["video=4", "a path, as text, or a list"]),
    "list of numbers": (PUBLISHED | {"videos": ["a.mp4", 4]}, ["videos=['a.mp4', 4]", "list"]),
    "nameless image": (PLAIN | {"images": [""]}, ["images=['']", "a path"]),
    "two names of images": (PLAIN | {"image": "a", "images": ["b"]}, ["image and images", "keep"]),
    "more media than places": (
        PLAIN | {"question": "<image> or <image> ?", "images": ["a.png", "b.png", "c.png"]},
        ["says <image> 2 times, but image names 3 files"],
    ),
    "a place for one kind only": (
        PLAIN | {"question": "<image> ?", "image": "a.png"},
        ["says <video> 0 times, but video names 1 files"],
    ),
    "a place without a file": (
        without(PLAIN, "video") | {"question": "<video> ?"},
        ["says <video> 1 times, but video names 0 files"],
    ),
    "nothing but media": (PLAIN | {"question": " <video> "}, ["question=' <video> '", "no words"]),
    "two names": (PLAIN | {"problem": "other ?"}, ["question and problem", "keep one"]),
    "open tag": (PLAIN | {"answer": "<answer>B"}, ["answer='<answer>B'", "</answer>"]),
    "two answers": (
        PLAIN | {"answer": "<answer>A</answer><answer>B</answer>"},
        ["answer='<answer>A</answer><answer>B</answer>'"],
    ),
    "answer in the reasoning": (PLAIN | {"reasoning": "so <answer>B"}, ["reasoning=", "<think>"]),
    "audio": (PUBLISHED | {"data_type": "audio"}, ["data_type='audio'", "image, video, text"]),
    "image without file": (PUBLISHED | {"data_type": "image"}, ["data_type='image'", "images"]),
    "video without file": (without(PUBLISHED, "videos"), ["data_type='video'", "videos"]),
    "absolute path": (PLAIN | {"video": "/etc/passwd"}, ["video='/etc/passwd'", "relative"]),
    "path above root": (PLAIN | {"video": "a/../../b.mp4"}, ["video='a/../../b.mp4'", "stays in"]),
    "one path above root": (
        PLAIN | {"images": ["a.png", "../b.png"]},
        ["image='../b.png'", "stays in"],
    ),
    "nul in a path": (PLAIN | {"video": "a\0.mp4"}, [r"video='a\x00.mp4'", "stays in"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_name(tmp_path, name):
    line, said = BAD[name]
    records = write(tmp_path, PLAIN, b"\n", line, PLAIN)
    with pytest.raises(RecordError) as caught:
        records[1]
    assert caught.value.where == "train.jsonl:3"  # as an editor counts, the blank line too
    for piece in ["train.jsonl:3", *said]:
        assert piece in str(caught.value)
    assert (
        records[0]
        == records[2]
        == Example(  # its neighbours are fine
            id="a", question="what ?", answer="B", media=(MediaFile(kind="video", path="v.mp4"),)
        )
    )


def test_a_long_value_is_cut_in_the_message(tmp_path):
    with pytest.raises(RecordError) as caught:
        write(tmp_path, PLAIN | {"answer": ["x" * 10_000]})[0]
    assert len(str(caught.value)) < 200


def test_a_link_may_not_leave_the_root_but_may_stay_in_it(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "real").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "inside").symlink_to(root / "real")
    (root / "outside").symlink_to(elsewhere)
    lines = [PLAIN | {"video": f"{folder}/v.mp4"} for folder in ("inside", "outside")]
    records = write(root, *lines, PLAIN | {"video": "real/../v.mp4"})
    assert records[0].about == "inside/v.mp4"
    assert records[2].about == "real/../v.mp4"
    with pytest.raises(RecordError, match="outside/v.mp4.*links followed"):
        records[1]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(RecordError, match=r"video='a/v\.mp4'"):
        write(tmp_path, PLAIN | {"video": "a/v.mp4"})[0]


def test_a_root_that_is_a_link_itself_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert write(tmp_path / "link", PLAIN)[0].about == "v.mp4"


def test_random_access_equals_reading_the_file_line_by_line(tmp_path):
    lines = [PLAIN | {"id": str(i), "question": "é漢" * i + " ?"} for i in range(1, 20)]
    raw = [json.dumps(line, ensure_ascii=i % 2 == 0).encode() for i, line in enumerate(lines)]
    records = write(tmp_path, b"\r\n \n".join(raw))  # blank lines, CRLF, no newline at the end
    assert len(records) == len(lines)
    for i in (0, 18, 7, 7, 1):
        assert records[i].question == lines[i]["question"]


def test_duplicate_ids_are_fine(tmp_path):
    records = write(tmp_path, PLAIN, PLAIN | {"question": "other ?"})
    assert [records[i].id for i in range(2)] == ["a", "a"]
    assert records[1].question == "other ?"


def test_records_travel_without_their_text(tmp_path):
    records = write(tmp_path, *[PLAIN | {"reasoning": "word " * 500}] * 200)
    packed = pickle.dumps(records)
    assert len(packed) < (tmp_path / "train.jsonl").stat().st_size / 50
    assert pickle.loads(packed)[199] == records[199]


def test_a_record_error_travels_whole(tmp_path):
    with pytest.raises(RecordError) as caught:
        write(tmp_path, b"{\n")[0]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.where) == (str(caught.value), "train.jsonl:1")


def test_a_missing_or_empty_file_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"no data file .*train\.jsonl.*data\.root"):
        open_records(tmp_path, "train.jsonl")
    with pytest.raises(ValueError, match="holds no records"):
        write(tmp_path, b"\n\n")


def test_the_registry_opens_it(tmp_path):
    write(tmp_path, PLAIN)
    assert pick(SOURCES, "longvideo_reason", "data.source")(tmp_path, "train.jsonl")[0].id == "a"
