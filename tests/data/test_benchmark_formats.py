"""Records of benchmarks in their published shape, and what is wrong with bad ones."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from longrl_jax.benchmarks import BENCHMARKS
from longrl_jax.data import SOURCES
from longrl_jax.data.fields import RecordError
from longrl_jax.options import join_options, split_options

MME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many pads?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. None of the above."],
    "answer": "C",
}
LVB = {
    "video_id": "86CxyhFV9MI",
    "question": "In the video, what is seen?",
    "question_wo_referring_query": "what is seen?",
    "candidates": ["a pad", "a cat", "a car", "rain", "snow"],
    "correct_choice": 1,
    "position": [854],
    "topic_category": "NP-News-Programs",
    "question_category": "T2E",
    "level": "IntraMoment",
    "id": "86CxyhFV9MI_0",
    "video_path": "86CxyhFV9MI.mp4",
    "subtitle_path": "86CxyhFV9MI_en.json",
    "duration_group": 600,
    "starting_timestamp_for_subtitles": 30,
    "duration": 190.16,
    "view_count": 259852,
}
LVB_ROW = {name: value for name, value in LVB.items() if name != "candidates"} | {
    **{"option0": "a pad", "option1": "a cat", "option2": "N/A", "option3": "N/A"},
    "option4": "N/A",
}
VNB = {
    "video": "/VNBench_new/3261112327_cnt_edit1.mp4",
    "question": "How many times does it say the word?",
    "options": [3, 5, 1, 2],
    "needle_time": [1.0, 5.0],
    "gt": 2,
    "gt_option": "D",
    "length": 45.2,
    "type": "cnt_edit1",
    "try": 0,
}
ANET = {
    "video_name": "1QIUV7WYKXg",
    "question": "is the athlete wearing trousers",
    "question_id": "v_1QIUV7WYKXg_3",
    "answer": "yes",
    "type": "3",
}
FILES = {"video_mme": MME, "longvideobench": LVB, "vnbench": VNB, "activitynet_qa": ANET}


def read(source, root, rows, file="rows.json"):
    if file.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / file)
    elif file.endswith(".jsonl"):
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (root / file).write_text(json.dumps(rows))
    return SOURCES[source](root, file)


def test_every_benchmark_has_its_format_and_its_scorers():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.source in SOURCES, name
        assert "strict" in benchmark.scorers, name
        assert ("official" in benchmark.scorers) != (benchmark.judge is not None), name
        assert (benchmark.rotations > 1) == bool(benchmark.together), name


@pytest.mark.parametrize("file", ["rows.json", "rows.jsonl", "test-00000-of-00001.parquet"])
def test_video_mme(tmp_path, file):
    (tmp_path / "data").mkdir()
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "data" / "fFjv93ACGo8.mkv").touch()
    (tmp_path / "subtitle" / "fFjv93ACGo8.srt").touch()
    other = MME | {"videoID": "other", "question_id": "002-1", "answer": "A"}
    records = read("video_mme", tmp_path, [MME, other], file)
    example, without = records[0], records[1]
    assert example.question == (
        "How many pads?\nA. One.\nB. Two.\nC. Three.\nD. None of the above."
    )
    assert (example.id, example.answer, example.kind) == ("001-1", "C", "Counting Problem")
    assert example.about == "data/fFjv93ACGo8.mkv"
    assert example.subtitles == "subtitle/fFjv93ACGo8.srt"
    assert dict(example.tags) == {
        **{"duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History"},
    }
    assert (without.about, without.subtitles) == ("data/other.mp4", "")


@pytest.mark.parametrize("file", ["lvb_val.json", "validation-00000-of-00001.parquet"])
def test_longvideobench(tmp_path, file):
    (tmp_path / "subtitles").mkdir()
    (tmp_path / "subtitles" / "86CxyhFV9MI_en.json").touch()
    row = LVB if file.endswith(".json") else LVB_ROW
    example = read("longvideobench", tmp_path, [row], file)[0]
    options = ["a pad", "a cat", "a car", "rain", "snow"] if row is LVB else ["a pad", "a cat"]
    assert split_options(example.question) == ("In the video, what is seen?", options)
    assert (example.id, example.answer, example.kind) == ("86CxyhFV9MI_0", "B", "T2E")
    assert example.about == "videos/86CxyhFV9MI.mp4"
    assert example.subtitles == "subtitles/86CxyhFV9MI_en.json"
    assert dict(example.tags) == {
        "duration_group": "600",
        "topic_category": "NP-News-Programs",
        "level": "IntraMoment",
        "subtitles_start_s": "30.0",
        "duration_s": "190.16",
    }


def test_longvideobench_without_the_subtitles(tmp_path):
    example = read("longvideobench", tmp_path, [LVB])[0]
    assert example.subtitles == "" and "duration_s" not in dict(example.tags)


def test_vnbench(tmp_path):
    rows = [VNB, VNB | {"try": 1, "gt_option": "B", "options": ["a cat", "a pad", "a", "b"]}]
    first, second = read("vnbench", tmp_path, rows)
    assert first.question.endswith("?\nA. 3\nB. 5\nC. 1\nD. 2")
    assert (first.id, first.answer, first.kind) == (
        "3261112327_cnt_edit1_cnt_edit1_0",
        "D",
        "cnt_edit1",
    )
    assert first.about == "VNBench_new/3261112327_cnt_edit1.mp4"
    assert dict(first.tags) == {"task": "counting", "question": "3261112327_cnt_edit1_cnt_edit1"}
    assert second.tags == first.tags and second.id != first.id and second.answer == "B"
    without = {name: value for name, value in VNB.items() if name != "gt_option"}
    assert read("vnbench", tmp_path, [without])[0].answer == "D"


def test_activitynet_qa(tmp_path):
    (tmp_path / "all_test").mkdir()
    (tmp_path / "all_test" / "v_1QIUV7WYKXg.webm").touch()
    example = read("activitynet_qa", tmp_path, [ANET], "test-00000-of-00001.parquet")[0]
    assert (example.question, example.answer) == ("Is the athlete wearing trousers?", "yes")
    assert (example.id, example.kind) == ("v_1QIUV7WYKXg_3", "yes/no")
    assert example.about == "all_test/v_1QIUV7WYKXg.webm"
    asked = {name: ANET[name] for name in ("video_name", "question", "question_id")}
    answer = {name: ANET[name] for name in ("answer", "type", "question_id")}
    (tmp_path / "test_a.json").write_text(json.dumps([answer | {"question_id": "x"}, answer]))
    pair = read("activitynet_qa", tmp_path, [asked, asked | {"question_id": "y"}], "test_q.json")
    assert pair[0] == example and len(pair) == 2
    with pytest.raises(RecordError, match=r"test_q.json\[1\]: question_id='y' has no answer"):
        pair[1]
    (tmp_path / "test_a.json").write_text(json.dumps([answer, answer]))
    with pytest.raises(RecordError, match=r"test_a.json\[1\]: .*stands twice"):
        SOURCES["activitynet_qa"](tmp_path, "test_q.json")


@pytest.mark.parametrize("source", FILES)
def test_options_are_in_the_form_that_can_be_shuffled(tmp_path, source):
    question = read(source, tmp_path, [FILES[source]])[0].question
    stem, options = split_options(question)
    assert question == join_options(stem, options)
    assert bool(options) == (source != "activitynet_qa")


@pytest.mark.parametrize(
    ("source", "change", "why"),
    [
        ("video_mme", {"videoID": "../../x"}, "must be a relative path that stays in"),
        ("video_mme", {"videoID": None}, "no videoID"),
        ("video_mme", {"options": ["One", "Two"]}, "must begin with their letters"),
        ("video_mme", {"options": ["B. One", "A. Two"]}, "must begin with their letters"),
        ("video_mme", {"options": "A. One"}, "must be a list of texts"),
        ("video_mme", {"answer": "E"}, "answer='E' must be a letter, A to D"),
        ("video_mme", {"answer": "AB"}, "answer='AB' must be a letter"),
        ("video_mme", {"question": " "}, "is empty"),
        ("video_mme", {"duration": 3.5}, "duration=3.5 must be text"),
        ("longvideobench", {"correct_choice": 5}, "correct_choice=5 must be 0 to 4"),
        ("longvideobench", {"correct_choice": "@"}, "correct_choice='@' must be 0 to 4"),
        ("longvideobench", {"candidates": None, "option0": "a"}, "1 options; 2 to"),
        ("longvideobench", {"video_path": "/x.mp4"}, None),
        ("longvideobench", {"video_path": "../../x.mp4"}, "must be a relative path"),
        ("longvideobench", {"subtitle_path": "../../x.json"}, "must be a relative path"),
        ("longvideobench", {"id": None}, "no id"),
        ("vnbench", {"gt_option": "E"}, "must be a letter, A to D"),
        ("vnbench", {"options": [1.5, 2]}, "must be a list of texts"),
        ("vnbench", {"options": [True, False]}, "must be a list of texts"),
        ("vnbench", {"video": "/../x.mp4"}, "must be a relative path"),
        ("vnbench", {"try": None}, "no try"),
        ("vnbench", {"type": ""}, "is empty"),
        ("activitynet_qa", {"answer": None}, "no answer"),
        ("activitynet_qa", {"video_name": "x/../../../../x"}, "must be a relative path"),
        ("activitynet_qa", {"question": 3}, "question=3 must be text"),
    ],
)
def test_a_bad_record_is_refused_by_name(tmp_path, source, change, why):
    records = read(source, tmp_path, [FILES[source], FILES[source] | change])
    if why is None:  # a path is joined under its folder first, so that it stays there
        assert records[1].about == "videos//x.mp4"
        return
    with pytest.raises(RecordError) as raised:
        records[1]
    assert raised.value.where == "rows.json[1]"
    assert why in str(raised.value)
    assert records[0].id


@pytest.mark.parametrize(
    ("field", "value"), [("duration", -1), ("duration", "x"), ("duration", True)]
)
def test_times_of_subtitles_are_seconds(tmp_path, field, value):
    (tmp_path / "subtitles").mkdir()
    (tmp_path / "subtitles" / "86CxyhFV9MI_en.json").touch()
    with pytest.raises(RecordError, match=f"{field}=.* must be seconds"):
        read("longvideobench", tmp_path, [LVB | {field: value}])[0]


@pytest.mark.parametrize("source", FILES)
def test_rows_that_are_no_objects(tmp_path, source):
    with pytest.raises(RecordError, match=r"rows.json\[0\]: 3 is not a JSON object"):
        read(source, tmp_path, [3])[0]
