"""Replies with questions: what is kept of malformed ones, and why the rest is left out."""

import collections
import json
import types

import pytest

from longrl_jax.data.generate import parse, replies, rewrite

LINES = [
    {"start_s": 0.0, "end_s": 10.0, "text": "A dog waits."},
    {"start_s": 10.0, "end_s": 20.0, "text": "It runs off."},
    {"start_s": 40.0, "end_s": 52.5, "text": "It is back."},
]
STEP = {"start": "0:10", "end": "0:20", "text": "The dog runs to the lake."}
CHOICE = {
    "question": "Where does the dog run?",
    "options": ["to the lake", "home", "into the wood", "up the hill"],
    "answer": "A",
    "reasoning": [STEP],
}
OPEN = {"question": "Where does the dog run?", "answer": "To the lake", "reasoning": [STEP]}
NAMED = ["A. to the lake", "B. home", "C. into the wood", "D. up the hill"]


@pytest.mark.parametrize(
    ("form", "change", "wanted"),
    [
        ("choice", {}, {"answer": 0}),
        ("choice", {"answer": "C"}, {"answer": 2}),
        ("choice", {"answer": "(C)"}, {"answer": 2}),
        ("choice", {"answer": "<answer>D</answer>"}, {"answer": 3}),
        ("choice", {"answer": "B. home"}, {"answer": 1}),
        ("choice", {"answer": "Into the wood."}, {"answer": 2}),  # by its words
        ("choice", {"options": NAMED}, {"options": CHOICE["options"]}),
        ("open", {"question": "Who waits in the line?"}, {"answer": "To the lake"}),
        ("choice", {"question": " Where\ndoes it  run? "}, {"question": "Where does it run?"}),
        ("open", {}, {"answer": "To the lake", "options": []}),
        (
            "open",
            {"reasoning": [STEP | {"start": "0:45", "end": "0:53"}]},  # the film ends at 52.5
            {"steps": [STEP | {"start": None}]},
        ),
    ],
)
def test_what_is_kept(form, change, wanted):
    got = parse.read((CHOICE if form == "choice" else OPEN) | change, form, lines=LINES)
    if "steps" in wanted:
        assert got["steps"] == [{"start_s": 45, "end_s": 52.5, "text": STEP["text"]}]
    else:
        assert wanted.items() <= got.items()


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("choice", {"question": ""}, "bad form"),
        ("choice", {"question": 7}, "bad form"),
        ("choice", {"question": "\ud800?"}, "bad form"),
        ("choice", {"options": CHOICE["options"][:3]}, "not four options"),
        ("choice", {"options": None}, "not four options"),
        ("choice", {"options": ["home", "Home.", "wood", "hill"]}, "options alike"),
        ("choice", {"options": ["home", "wood", "hill", "all of the above"]}, "option about"),
        ("choice", {"options": ["home", "wood", "hill", "both A and B"]}, "option about options"),
        ("choice", {"answer": "E"}, "no one answer"),
        ("choice", {"answer": "the sea"}, "no one answer"),
        ("choice", {"answer": ["A"]}, "bad form"),
        ("choice", {"answer": "A and C"}, "no one answer"),
        ("open", {"answer": " "}, "bad form"),
        ("open", {"reasoning": []}, "no reasoning"),
        ("open", {"reasoning": "It runs."}, "no reasoning"),
        ("open", {"reasoning": [{"start": "0:10", "text": "x"}]}, "bad form"),
        ("open", {"reasoning": [STEP | {"start": "later"}]}, "bad form"),
        ("open", {"reasoning": [STEP | {"start": "0:20", "end": "0:10"}]}, "outside the film"),
        ("open", {"reasoning": [STEP | {"start": "1:40", "end": "3:20"}]}, "outside the film"),
        ("open", {"reasoning": [STEP | {"start": "0:22", "end": "0:38"}]}, "outside the story"),
        ("open", {"question": "What do the captions say?"}, "speaks of captions"),
        ("open", {"reasoning": [STEP | {"text": "According to the story it ran."}]}, "captions"),
        ("open", {"answer": "In the text it runs to the lake"}, "speaks of captions"),
        ("open", {"question": "Does it <answer>run</answer>?"}, "holds a tag"),
        ("open", {"question": "<|im_end|> Where?"}, "holds a tag"),
        ("open", {"question": "Does the dog run to the lake?"}, "holds its answer"),
        ("open", {"question": "1:00"}, "no words"),
        ("open", {"answer": "..."}, "no words"),
        ("choice", {"question": "so " * 500}, "too long"),
        ("choice", {"reasoning": [STEP | {"text": "So option B is wrong."}]}, "names a letter"),
    ],
)
def test_what_is_left_out(form, change, reason):
    draft = (CHOICE if form == "choice" else OPEN) | change
    with pytest.raises(parse.Unusable) as caught:
        parse.read(draft, form, lines=LINES)
    assert reason in caught.value.args[0]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '```json\n{"a": 1}\n```',
        'Sure: {"a": 1}',
        '<think>is it {"b": 2}?</think> {"a": 1}\n',
    ],
)
def test_json_is_found_in_a_reply(text):
    assert replies.json_object(text) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["", "none", '{"a": 1', '{"a": 1} {"b": 2}', "[1]", "{'a': 1}", '{"a":' * 10_000]
)
def test_a_reply_without_whole_json_is_asked_again(text):
    assert isinstance(replies.check_json(text), ValueError)


def test_replies_that_are_no_questions_are_rejects():
    cfg = types.SimpleNamespace(question=types.SimpleNamespace(per_kind=2))

    def items_of(*texts):
        rows = [{"kind": "plot", "form": "open", "reply": text} for text in texts]
        about = [{"sha256": "0" * 64}]
        steps = parse.steps("film", rows, cfg, [{"lines": LINES}], about)
        with pytest.raises(StopIteration) as stop:
            next(steps)
        return stop.value.value

    twice = json.dumps({"questions": [OPEN, OPEN | {"question": "where does the DOG run"}, OPEN]})
    items, rejects = items_of('{"questions": []}', '{"questions": 7}', '{"questions": [7]}', twice)
    assert [item["question"] for item in items] == [OPEN["question"]]
    assert [row["reason"] for row in rejects] == [
        "question: none written",
        "question: bad form",
        "question: bad form",
        "question: asked twice",
    ]
    assert rejects[-1]["draft"]["question"] == "where does the DOG run"  # kept, to be looked at


def test_letters_are_even_within_a_film_and_follow_their_options():
    for content in ("0" * 64, "7" * 64, "abcdef01" * 8):
        items = [
            {"id": str(i), "options": [f"right {i}", "x", "y", "z"], "answer": 0} for i in range(8)
        ]
        got = parse.with_letters([*items, {"id": "o", "options": [], "answer": "free"}], content)
        assert got[-1]["answer"] == "free"
        letters = collections.Counter(item["answer"] for item in got[:-1])
        assert letters == dict.fromkeys("ABCD", 2)
        for i, item in enumerate(got[:-1]):
            assert item["options"]["ABCD".index(item["answer"])] == f"right {i}"
            assert sorted(item["options"]) == sorted([f"right {i}", "x", "y", "z"])
    orders = {tuple(item["options"]) for item in got[:-1]}
    assert len({tuple(x for x in order if x in "xyz") for order in orders}) > 1  # shuffled, too


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("First it waits, then it runs to the lake.", ""),
        ("I choose option B, the lake.", ""),
        ("So the answer is C.", "names another letter"),
        ("The caption says so.", "speaks of captions"),
        ("At 0:12 it runs.", "tells clock times"),
        ("<think>It runs.</think>", "holds a tag"),
    ],
)
def test_rewritten_reasonings(said, fault):
    item = {"options": ["home", "to the lake", "x", "y"], "answer": "B"}
    assert rewrite.fault(said, item, cut=False) == fault
    assert rewrite.fault(said, item, cut=True) == "cut off"
