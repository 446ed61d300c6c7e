"""Every published form: what comes of it, what is refused, and by which words."""

import copy
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import WANT, WRITE, picture, write_json, write_parquet
from pyarrow import parquet as arrow

from longrl_jax.data import SOURCES, formats, parquet, unpacked, video
from longrl_jax.data.fields import RecordError
from longrl_jax.data.longvideo_reason import open_records, to_record
from longrl_jax.data.rows import Csv, JsonArray
from longrl_jax.types import Example, MediaFile


def read(source, root, file):
    records = SOURCES[source](root, file)
    return [records[i] for i in range(len(records))]


def refusal(source, root, file, index=0) -> str:
    with pytest.raises(RecordError) as caught:
        SOURCES[source](root, file)[index]
    return str(caught.value)


@pytest.mark.parametrize("source", sorted(WANT))
def test_the_published_form_is_read(tmp_path, source):
    assert read(source, tmp_path, WRITE[source](tmp_path)) == WANT[source]


def test_every_published_form_has_a_source():
    assert set(WRITE) <= set(SOURCES)


@pytest.mark.parametrize("source", sorted(WRITE))
def test_conversion_to_the_plain_form_loses_nothing(tmp_path, source):
    file, out = WRITE[source](tmp_path), tmp_path / "plain.jsonl"
    assert formats.main(["convert", source, str(tmp_path), file, str(out)]) == 0
    plain = open_records(tmp_path, "plain.jsonl")
    assert [plain[i] for i in range(len(plain))] == read(source, tmp_path, file)


@pytest.mark.parametrize("source", sorted(WRITE))
def test_records_travel_without_their_text(tmp_path, source):
    file = WRITE[source](tmp_path)
    records = SOURCES[source](tmp_path, file)
    records[0]  # what it holds after it was read is left behind
    sent = pickle.dumps(records)
    assert len(sent) < 4000
    assert [pickle.loads(sent)[i] for i in range(len(records))] == read(source, tmp_path, file)


# --- what is refused ----------------------------------------------------------------------------


def edited(tree, path, value):
    """Returns a copy in which the value at a path of keys is another, or gone (None)."""
    tree = copy.deepcopy(tree)
    *parents, last = path
    node = tree
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


FIRST = (0, "conversations", 0, "value")
ASKED = ("video_1", "mc_question", 0)
BAD_JSON = {  # source -> (file's tree, [(path, value or None, words of the message)])
    "llava_video": (
        published.LLAVA,
        [
            ((0, "conversations"), None, "[0]: {'id': 'RW587', 'data_source'"),
            ((0, "conversations"), [], "must have conversations, a list of turns"),
            ((0, "conversations", 1, "from"), "human", "human and gpt take turns"),
            (FIRST, "What is on the arm?", "has no <image>, where the video stands"),
            (FIRST, "<image>\n<image>\nWhat?", "shows a second video"),
            (FIRST, "<image>\n", "has no words"),
            (FIRST, 3, "value=3 must be text"),
            (FIRST, "<image> \ud800", "must be valid Unicode"),
            ((0, "conversations", 1, "value"), "C.", "begin with one of the letters A, B"),
            ((0, "conversations", 1, "value"), "the watch", "begin with one of the letters"),
            ((0, "video"), None, "no video; it must be a text"),
            ((0, "video"), "../x.mp4", "must be a relative path that stays in"),
            ((0, "video"), "/etc/passwd", "must be a relative path that stays in"),
            ((0, "id"), None, "no id"),
            ((0, "id"), True, "id=True must be text or a whole number"),
        ],
    ),
    "perception_test": (
        published.PERCEPTION,
        [
            (("video_1", "metadata"), None, "[video_1]: no video_id"),
            ((*ASKED, "options"), ["one"], "options has 1 options; 2 to 26"),
            ((*ASKED, "options"), ["a", 3, "b"], "must be a list of texts"),
            ((*ASKED, "answer_id"), 3, "answer_id=3 must be 0 to 2"),
            ((*ASKED, "answer_id"), None, "no answer_id; a test set without its answers"),
            ((*ASKED, "question"), "", "[video_1]/0: question='' is empty"),
            ((*ASKED, "tag"), {"a": 1}, "tag={'a': 1} must be text"),
            ((*ASKED, "id"), None, "no question_id"),
            (("video_1", "metadata", "video_id"), "../../v", "must be a relative path"),
            (("video_1", "mc_question"), ["what?", "why?"], "is not a JSON object"),
        ],
    ),
    "clevrer": (
        published.CLEVRER,
        [
            ((0, "questions"), None, "[0]: no question_type"),
            ((0, "video_filename"), "../x.mp4", "must be like video_10003.mp4"),
            ((0, "questions", 0, "answer"), None, "[0]/0: no answer"),
            ((0, "questions", 0, "question_type"), "predictive", "choices=None must be a list"),
            ((0, "questions", 0, "question_id"), None, "no question_id"),
        ],
    ),
    "star": (
        published.STAR,
        [
            ((0, "answer"), "The cat.", "answer='The cat.' must be one of the choices"),
            ((0, "answer"), None, "no answer"),
            ((0, "choices"), "The box.", "must be a list of objects"),
            ((0, "choices", 0, "choice"), "The door.", "must be one of the choices"),  # twice
            ((0, "start"), "early", "start='early' must be a time in seconds"),
            ((0, "end"), None, "end=None must be a time in seconds"),
            ((0, "end"), 11.1, "start=11.1 and end=11.1 must be seconds, 0 <= start < end"),
            ((0, "video_id"), "../../x", "must be a relative path that stays in"),
            ((0, "question_id"), None, "no question_id"),
        ],
    ),
}
CASES = [(source, *case) for source, (_, cases) in BAD_JSON.items() for case in cases]


@pytest.mark.parametrize("source, path, value, said", CASES)
def test_a_malformed_record_is_refused_by_name(tmp_path, source, path, value, said):
    tree, _ = BAD_JSON[source]
    file = write_json(tmp_path, "file.json", edited(tree, path, value))
    message = refusal(source, tmp_path, file)
    assert said in message and message.startswith("file.json[")


def test_a_name_that_no_file_system_takes_costs_its_own_record(tmp_path, capsys, monkeypatch):
    file = WRITE["star"](tmp_path)
    tree = edited(published.STAR, (0, "question_id"), "x" * 300)
    write_json(tmp_path, file, edited(tree, (0, "video_id"), "y" * 300))
    (tmp_path / "star_clips").mkdir(exist_ok=True)
    (tmp_path / "Charades_v1_480").mkdir(exist_ok=True)
    assert read("star", tmp_path, file)[0].id == "x" * 300  # whoever opens the film refuses it
    monkeypatch.chdir(tmp_path)
    assert formats.main(["check", "star", str(tmp_path), file]) == 1
    assert ".mp4 is not there" in capsys.readouterr().out


def test_wrong_choices_of_clevrer_are_refused(tmp_path):
    for value, said in [("maybe", "'maybe' of a choice must be correct or wrong"), (None, "None")]:
        path = (0, "questions", 1, "choices", 2, "answer")
        file = write_json(tmp_path, "file.json", edited(published.CLEVRER, path, value))
        assert said in refusal("clevrer", tmp_path, file, 1)


def test_the_others_of_a_file_with_a_malformed_record_are_read(tmp_path):
    file = write_json(tmp_path, "f.json", edited(published.LLAVA, (0, "conversations"), "no"))
    published.touch(tmp_path, published.LLAVA[1]["video"])
    records = SOURCES["llava_video"](tmp_path, file)
    assert len(records) == 2 and records[1] == WANT["llava_video"][2]


BAD_CSV = [
    ("7,1,2,3,why,5,5,CW,a,b,c,d,e", "val.csv:2: answer=5 must be 0 to 4"),
    ("7,1,2,3,why,,5,CW,a,b,c,d,e", "no answer; a test set without its answers"),
    ("7,1,2,3,why,0,5,CW,a,b,,d,e", "a0 to a4=['a', 'b', '', 'd', 'e'] must be a list of texts"),
    ("7,1,2,3,,0,5,CW,a,b,c,d,e", "question='' is empty"),
    ("7,1,2,3,why,0,5,CW,a,b,c,d", "val.csv:2: 12 cells for 13 columns"),
    (",1,2,3,why,0,5,CW,a,b,c,d,e", "no video"),
    ("../../7,1,2,3,why,0,5,CW,a,b,c,d,e", "must be a relative path that stays in"),
    ("7,1,2,3,why,0,5,,a,b,c,d,e", "type='' is empty"),
]


@pytest.mark.parametrize("line, said", BAD_CSV)
def test_a_malformed_line_of_nextqa_is_refused_by_name(tmp_path, line, said):
    (tmp_path / "val.csv").write_text("\n".join([",".join(published.NEXTQA_COLUMNS), line]))
    assert said in refusal("nextqa", tmp_path, "val.csv")


def test_nextqa_has_an_open_ended_form(tmp_path):
    header = "video,frame_count,width,height,question,answer,qid,type"
    (tmp_path / "val.csv").write_text(f"{header}\n7,1,2,3,what does it do,it runs,5,DO\n")
    assert read("nextqa", tmp_path, "val.csv") == [
        Example(
            id="7-5",
            question="what does it do",
            answer="it runs",
            kind="descriptive",
            media=published.film("NExTVideo/7.mp4"),
            tags=(("type", "DO"),),
        )
    ]


def test_the_hubs_tables_are_read_as_the_authors_files(tmp_path):
    """lmms-lab/NExTQA and lmms-lab/PerceptionTest_Val: the same fields, in parquet."""
    file = published.write_nextqa(tmp_path)
    rows = [dict(zip(published.NEXTQA_COLUMNS, row, strict=True)) for row in published.NEXTQA]
    write_parquet(tmp_path, "nextqa/MC.parquet", rows)
    want = read("nextqa", tmp_path, file)
    assert read("nextqa", tmp_path, "nextqa/MC.parquet") == want
    asked = [
        {"video_name": "video_1", "question_id": str(q["id"])}
        | {name: q[name] for name in ("question", "options", "area", "reasoning", "tag")}
        | {"answer_id": str(q["answer_id"])}
        for q in published.PERCEPTION["video_1"]["mc_question"]
    ]
    write_parquet(tmp_path, "val.parquet", asked)
    assert read("perception_test", tmp_path, "val.parquet") == WANT["perception_test"]


# --- files as a whole ---------------------------------------------------------------------------

BAD_FILES = [
    ("llava_video", b"", "bad.x:1: not a JSON array or object (expected [ or {, column 1)"),
    ("llava_video", b"[]", "holds no records"),
    ("llava_video", b'[{"id": 1},\n {"id": 2', "bad.x:2: not a JSON array"),
    ("llava_video", b"[1,]", "not a JSON array"),
    ("llava_video", b"[1 2]", "expected , or ]"),
    ("llava_video", b"[1] 2", "expected the end of the file"),
    ("llava_video", b"{1: 2}", "expected a name"),
    ("llava_video", b'{"a" 2}', "expected :"),
    ("llava_video", b"[" * 100_000, "nested without end"),
    ("nextqa", b"video,question\n1,2\n", "has no column answer, qid, type"),
    ("nextqa", b"video,question,answer,qid,type\n", "holds no records"),
    ("nextqa", b"\xff\xfe\x00", "is no CSV file in UTF-8"),
    ("image_qa", b"", "holds no records"),
]


@pytest.mark.parametrize("source, content, said", BAD_FILES)
def test_a_file_that_is_bad_as_a_whole_is_refused_when_it_is_opened(
    tmp_path, source, content, said
):
    (tmp_path / "bad.x").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        SOURCES[source](tmp_path, "bad.x")
    assert said in str(caught.value) and not isinstance(caught.value, RecordError)


@pytest.mark.parametrize("source", sorted(SOURCES))
@pytest.mark.parametrize("file", ["../x.json", "../x.parquet", "/x.json", "/x.parquet", "gone.x"])
def test_a_data_file_must_lie_under_the_root(tmp_path, source, file):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("x.json", "x.parquet"):
        (tmp_path / name).write_bytes(b"[1]")
    with pytest.raises(ValueError, match="lies outside data.root|there is no data file"):
        SOURCES[source](root, file)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(
    tree=st.lists(values, min_size=1, max_size=5)
    | st.dictionaries(st.text(alphabet=st.characters(exclude_categories=["Cs"])), values,
                      min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    mark=st.booleans(),
)  # fmt: skip
def test_random_access_to_an_array_equals_parsing_it(tmp_path_factory, tree, indent, ascii_only,
                                                     mark):  # fmt: skip
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    root = tmp_path_factory.getbasetemp()
    (root / "any.json").write_bytes(b"\xef\xbb\xbf" * mark + text.encode("utf-8", "surrogatepass"))
    rows = JsonArray(root, "any.json")
    want = list(tree) if isinstance(tree, list) else list(tree.values())
    got = []
    for i in range(len(rows)):
        try:
            got.append(rows[i])
        except RecordError as error:  # half a surrogate pair, as bytes, is no UTF-8
            assert not ascii_only and "not JSON" in error.message
            got.append(want[i])
    assert got == want


def test_an_endless_name_is_cut_and_takes_no_room(tmp_path):
    tree = {"x" * 100_000: {}, **{str(i): {} for i in range(50)}}
    array = JsonArray(tmp_path, write_json(tmp_path, "a.json", tree) or "a.json")
    assert array.where(0) == f"a.json[{'x' * 80}]" and array.where(50) == "a.json[49]"
    assert len(pickle.dumps(array)) < 100_000


def test_a_field_that_stands_twice_in_an_element_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": 1}, {"id": 1, "id": 2}]')
    rows = JsonArray(tmp_path, "a.json")
    assert rows[0] == {"id": 1}
    with pytest.raises(RecordError, match=r"a.json\[1\]: the field 'id' stands twice"):
        rows[1]


def test_lines_of_a_csv_file_are_counted_as_an_editor_does(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n"1\r\n2",3\r\n\r\n4,5\r\n')
    rows = Csv(tmp_path, "a.csv", ("a", "b"))
    assert [rows[i] for i in range(2)] == [{"a": "1\r\n2", "b": "3"}, {"a": "4", "b": "5"}]
    assert [rows.where(i) for i in range(2)] == ["a.csv:2", "a.csv:5"]


# --- parquet ------------------------------------------------------------------------------------


def test_rows_of_shards_are_numbered_on_and_named_by_their_file(tmp_path):
    file = published.write_longvideo_reason(tmp_path)
    records = SOURCES["longvideo_reason"](tmp_path, file)
    shards = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
    assert [records.where(i) for i in range(5)] == [
        *(f"{shards[0]}[{i}]" for i in range(3)),
        *(f"{shards[1]}[{i}]" for i in range(2)),
    ]
    order = np.random.default_rng(0).permutation(5)
    assert [records[i].id for i in order] == [str(i) for i in order]
    for folder in (".", "data"):
        assert read("longvideo_reason", tmp_path, folder) == WANT["longvideo_reason"]


def test_a_malformed_row_is_refused_by_name(tmp_path):
    rows = [published.LONGVIDEO[0], published.LONGVIDEO[1] | {"videos": "../x.mp4"}]
    write_parquet(tmp_path, "a.parquet", rows)
    message = refusal("longvideo_reason", tmp_path, "a.parquet", 1)
    assert message.startswith("a.parquet[1]: video='../x.mp4' must be a relative path")


SHARDS = [
    (["train-00000-of-00001", "test-00000-of-00001"], "several splits, test, train; name one"),
    (["train", "openended"], "several splits"),
    (["train-00000-of-00003", "train-00002-of-00003"], "not all of one set; fetch what is missing"),
    (["train-00000-of-00001", "train-00000-of-00002"], "not all of one set"),
    (["train-00000-of-00001", "train"], "not all of one set"),
    (["part-0", "part-1"], ""),
    (["0000", "0001"], ""),
]


@pytest.mark.parametrize("names, said", SHARDS)
def test_a_folder_is_read_as_one_only_if_it_is_one_split_and_whole(tmp_path, names, said):
    for i, name in enumerate(names):
        write_parquet(tmp_path, f"data/{name}.parquet", [published.MATH[0] | {"answer": str(i)}])
    if said:
        with pytest.raises(ValueError, match=said):
            SOURCES["text_math"](tmp_path, ".")
    else:
        assert [example.answer for example in read("text_math", tmp_path, ".")] == ["0", "1"]


def test_a_link_to_a_shard_elsewhere_is_refused(tmp_path):
    write_parquet(tmp_path, "there/a.parquet", published.MATH)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.parquet").symlink_to(tmp_path / "there/a.parquet")
    for file in ("a.parquet", "*.parquet", "."):
        with pytest.raises(ValueError, match="lies outside data.root"):
            SOURCES["text_math"](tmp_path / "root", file)


def test_a_parquet_file_that_is_none_or_of_other_columns_is_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="is no whole parquet file .*; fetch it again"):
        SOURCES["text_math"](tmp_path, "text.parquet")
    write_parquet(tmp_path, "other.parquet", [{"x": 1}])
    with pytest.raises(ValueError, match="has the columns x; wanted are those of id, problem"):
        SOURCES["text_math"](tmp_path, "other.parquet")
    write_parquet(tmp_path, "a-0.parquet", published.MATH)
    write_parquet(tmp_path, "a-1.parquet", [{"problem": "x", "answer": "y", "id": "z"}])
    with pytest.raises(ValueError, match=r"a-1.parquet has the columns .*, as in the first file"):
        SOURCES["text_math"](tmp_path, "a-*.parquet")


def test_a_row_group_that_is_too_large_is_refused(tmp_path, monkeypatch):
    rows = [{"problem": "x" * 300, "answer": "y", "other": os.urandom(5000)}] * 2
    write_parquet(tmp_path, "a.parquet", rows)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 4000)
    assert len(SOURCES["text_math"](tmp_path, "a.parquet")) == 2  # columns that are not read
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 200)
    with pytest.raises(ValueError, match="write the file anew with row groups of 100 rows"):
        SOURCES["text_math"](tmp_path, "a.parquet")


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    rows = [{"problem": f"{i} " + os.urandom(200).hex(), "answer": "y"} for i in range(4)]
    write_parquet(tmp_path, "a.parquet", rows)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    about = arrow.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    start = about.dictionary_page_offset or about.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(content)
    records = SOURCES["text_math"](tmp_path, "a.parquet")
    assert [records[i].question[0] for i in (0, 1)] == ["0", "1"]
    assert "a.parquet[2]: cannot be read" in refusal("text_math", tmp_path, "a.parquet", 2)


# --- images by their bytes ----------------------------------------------------------------------


def unpacked_path(content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return f"unpacked/{digest[:2]}/{digest}.image"


def test_images_are_taken_out_by_their_content(tmp_path):
    file = published.write_image_qa(tmp_path)
    png, jpeg = picture(8), picture(9, "JPEG")
    want = [
        Example(
            id="train.parquet[0]",
            question="How many items are there?",
            answer="3",
            media=(MediaFile(kind="image", path=unpacked_path(png)),),
        ),
        Example(
            id="train.parquet[1]",
            question="Is  larger than ?",
            answer="yes",
            media=(
                MediaFile(kind="image", path=unpacked_path(jpeg), at=3),
                MediaFile(kind="image", path=unpacked_path(png), at=16),
            ),
        ),
    ]
    assert read("image_qa", tmp_path, file) == want
    files = sorted(p for p in (tmp_path / "unpacked").rglob("*") if p.is_file())
    assert files == sorted(tmp_path / unpacked_path(x) for x in (png, jpeg))
    assert (tmp_path / unpacked_path(png)).read_bytes() == png
    assert video.probe_image(tmp_path / unpacked_path(jpeg)) == (9, 9)
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    times = [path.stat().st_mtime_ns for path in files]
    read("image_qa", tmp_path, file)
    assert [path.stat().st_mtime_ns for path in files] == times  # written once
    files[0].write_bytes(b"half")
    assert read("image_qa", tmp_path, file) == want and len(files[0].read_bytes()) > 4


NO_IMAGES = [
    (b"", "the picture in it has 0 bytes"),
    (b"#!/bin/sh\nrm -rf /\n", "the picture in it is no picture in PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "the picture in it is no picture in"),
    (b"\x80\x04\x95pickle", "the picture in it is no picture in PNG"),
]


@pytest.mark.parametrize("content, said", NO_IMAGES)
def test_bytes_that_are_no_picture_are_refused_and_leave_nothing(tmp_path, content, said):
    row = {"problem": "<image>what?", "answer": "A", "images": [{"bytes": content, "path": "x"}]}
    write_parquet(tmp_path, "a.parquet", [row])
    message = refusal("image_qa", tmp_path, "a.parquet")
    assert message.startswith("a.parquet[0]: ") and said in message
    assert not [path for path in (tmp_path / "unpacked").rglob("*") if path.is_file()]


def test_a_stored_name_of_an_image_says_nothing_about_where_it_goes(tmp_path):
    image = {"bytes": picture(8), "path": "../../outside.png"}
    row = {"problem": "<image>what?", "answer": "A", "images": [image]}
    root = tmp_path / "root"
    write_parquet(root, "a.parquet", [row])
    (example,) = read("image_qa", root, "a.parquet")
    assert example.media[0].path == unpacked_path(picture(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
    row["images"] = [image | {"bytes": None}]  # by name, then: it must stay in the root
    write_parquet(root, "b.parquet", [row])
    assert "must be a relative path that stays in" in refusal("image_qa", root, "b.parquet")


def test_images_are_not_written_through_a_link_that_leads_out(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    file = published.write_image_qa(root)
    elsewhere.mkdir()
    (root / unpacked.FOLDER).symlink_to(elsewhere)
    with pytest.raises(ValueError, match="leads out of data.root"):
        SOURCES["image_qa"](root, file)[0]
    assert not list(elsewhere.iterdir())


def test_a_disk_that_takes_no_more_ends_the_run_in_words(tmp_path, monkeypatch):
    file = published.write_image_qa(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacked, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device.*pictures are taken out to data"):
        SOURCES["image_qa"](tmp_path, file)[0]


def test_images_may_be_named_by_path_or_stand_as_bytes_alone(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(8))
    lines = [{"problem": "<image>what?", "answer": "A", "images": ["x.png"], "id": "one"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(lines[0]))
    (example,) = read("image_qa", tmp_path, "a.jsonl")
    assert (example.id, example.media[0].path) == ("one", "x.png")
    write_parquet(tmp_path, "b.parquet", [{"prompt": "what?", "answer": "A", "image": picture(9)}])
    (example,) = read("image_qa", tmp_path, "b.parquet")
    assert example.media[0].path == unpacked_path(picture(9))


def test_questions_with_and_without_images_are_told_apart(tmp_path):
    text, images = tmp_path / "text", tmp_path / "images"
    file = published.write_text_math(text)
    assert "has 0 images; name one in images" in refusal("image_qa", text, file)
    file = published.write_image_qa(images)
    assert "has 1 images; read it as data.source=image_qa" in refusal("text_math", images, file)


# --- the command --------------------------------------------------------------------------------


def test_check_counts_lists_and_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"id": i, "question": "what ?\nA. x\nB. y", "answer": "B", "video": "v.mp4", "kind": kind}
        for i, kind in enumerate(["plot", "plot", "goal", "goal", "goal"])
    ]
    lines[1]["answer"], lines[2]["video"], lines[3]["video"] = "", "gone.mp4", "zero.mp4"
    lines.append(lines[0])
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "v.mp4").write_bytes(b"a film")
    (tmp_path / "zero.mp4").write_bytes(b"")
    assert formats.main(["check", "longvideo_reason", str(tmp_path), "train.jsonl"]) == 1
    said = capsys.readouterr().out
    assert "3 records can be used, 3 are refused" in said
    assert "2 plot" in said and "1 goal" in said
    assert "3 media are named, 2 of them are not there" in said
    assert "1 ids stand more than once, e.g. '0'" in said
    assert "[video v.mp4]" in said and "  B. y\n" in said and "Watch the video" in said
    refused = [
        json.loads(x) for x in Path("refused_longvideo_reason.jsonl").read_text().splitlines()
    ]
    assert [row["where"] for row in refused] == ["train.jsonl:2", "train.jsonl:3", "train.jsonl:4"]
    for row, words in zip(
        refused, ["is empty", "gone.mp4 is not there", "has 0 bytes"], strict=True
    ):
        assert words in row["message"] and f"{row['where']}: {row['message']}" in said


def test_convert_never_writes_over_a_file_nor_half_of_one(tmp_path, capsys):
    file = published.write_text_math(tmp_path)
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(SystemExit, match="is there already; name another file"):
        formats.main(["convert", "text_math", str(tmp_path), file, str(out)])
    assert out.read_text() == "mine"
    with pytest.raises(SystemExit, match="SOURCE='math' is unknown; choose one of activity"):
        formats.main(["check", "math", str(tmp_path), file])


def test_a_question_that_spells_a_placeholder_cannot_be_converted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = edited(published.STAR, (0, "question"), "What is <video> here?")
    published.touch(tmp_path, "Charades_v1_480/6H78U.mp4")
    file = write_json(tmp_path, "s.json", tree)
    formats.main(["convert", "star", str(tmp_path), file, str(tmp_path / "out.jsonl")])
    assert "s.json[0]: its words hold a placeholder" in capsys.readouterr().out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_a_plain_record_of_each_is_one_line_of_json(tmp_path):
    for examples in WANT.values():
        for example in examples:
            assert "\n" not in json.dumps(to_record(example))
