"""Rewards by rule for numbers, spans of time and short texts: tables of cases, bad ones too."""

import random

import numpy as np
import pytest
from transformers.data.metrics import squad_metrics

from longrl_jax import rewards
from longrl_jax.rewards import free_text, numeric, time_span
from longrl_jax.types import Example, Scored

HUGE = "7 " * 100_000


def scored(text, answer, template="think"):
    example = Example(id="x", question="How long?", answer=answer)
    return Scored(example=example, text=text, num_tokens=1, finish_reason="stop", template=template)


RIGHT = [
    ("42", "42"),
    ("42.0", "42"),
    ("  The answer is 42.", "42"),
    ("1,234", "1234"),
    (r"1{,}234", "1234"),
    ("1\u2009234", "1234"),
    ("\u2212 3".replace(" ", ""), "-3"),
    ("\u0664\u0662", "42"),  # Arabic-Indic digits
    (".5", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"1\frac{1}{2}", "1.5"),
    ("1 1/2", "1.5"),
    ("0.333333333", "1/3"),
    ("1e-3", "0.001"),
    (r"1.5 \times 10^{3}", "1500"),
    ("1.5 x 10^3", "1500"),
    ("2 million", "2,000,000"),
    ("three", "3"),
    ("There are twenty-five people", "25"),
    ("$5", "5"),
    (r"\$5.00", "5"),
    ("45%", "45%"),
    ("45 percent", "45%"),
    (r"45\%", "45 per cent"),
    ("45", "45%"),
    ("0.45", "45%"),
    ("45%", "0.45"),
    ("3 minutes", "3 min"),
    ("180 s", "3 minutes"),
    ("3 minutes", "3"),
    ("3", "3 minutes"),
    ("1 h 5 min", "65 minutes"),
    ("1h5min", "65 minutes"),
    ("3 minutes and 20 seconds", "200 s"),
    ("1:05", "65 seconds"),
    ("1:00:05", "3605 s"),
    ("5000 m", "5 km"),
    (r"5\text{ km}", "5 km"),
    ("5 apples", "5 pears"),  # what is counted is for the question to say
    ("12.4", "12 +- 0.5"),
    ("12.4", "12 \u00b1 0.5"),
    (r"12.4", r"12 \pm 0.5"),
    ("1 m", "100 cm +- 5%"),
    ("104.9 cm", "100 cm +- 5%"),
    ("61 s", "1 min +- 2 s"),
]
WRONG = [
    ("43", "42"),
    ("", "42"),
    ("many", "42"),
    ("41 or 42", "42"),
    ("41-42", "42"),
    ("3,5", "3.5"),
    ("3,5", "35"),
    ("1,23", "123"),
    ("1.2.3", "1.2"),
    ("A42", "42"),
    ("0.45", "45"),
    ("3 minutes", "3 hours"),
    ("5 m", "5 km"),
    ("5 kg", "5 km"),
    ("3 minutes", "180"),  # 180 of what? only the number as it is written counts
    ("-42", "42"),
    ("1/0", "0"),
    ("9e999", "42"),
    ("nan", "42"),
    ("infinity", "42"),
    ("9" * 900, "42"),
    (HUGE, "7"),
    ("12.6", "12 +- 0.5"),
    ("106 cm", "100 cm +- 5%"),
    ("64 s", "1 min +- 2 s"),
]
NO_NUMBER = ["", "red", "3 or 4", "1,5", "12 +- some", "9e999"]


@pytest.mark.parametrize("given, reference", RIGHT)
def test_the_same_number_in_other_words_is_right(given, reference):
    assert numeric.is_right(given, reference) is True


@pytest.mark.parametrize("given, reference", WRONG)
def test_another_number_or_none_is_wrong(given, reference):
    assert numeric.is_right(given, reference) is False


@pytest.mark.parametrize("reference", NO_NUMBER)
def test_a_reference_that_is_no_number_judges_nothing(reference):
    assert numeric.is_right("3", reference) is None
    assert numeric.reward([scored("<answer>3</answer>", reference)]) == [None]


SPANS = [
    ("1:05-1:20", [(65, 80)]),
    ("00:01:05 - 00:01:20", [(65, 80)]),
    ("1:05 to 1:20", [(65, 80)]),
    ("It happens between 1:05 and 1:20.", [(65, 80)]),
    ("1:05 \u2013 1:20", [(65, 80)]),
    ("1:05\u22121:20", [(65, 80)]),
    ("[65, 80]", [(65, 80)]),
    ("[65,80]", [(65, 80)]),
    ("(65.5, 80.25)", [(65.5, 80.25)]),
    ("from 65 to 80 seconds", [(65, 80)]),
    ("65s - 80s", [(65, 80)]),
    ("65-80s", [(65, 80)]),
    ("65 s until 1:20", [(65, 80)]),
    ("1 to 2 minutes", [(60, 120)]),
    ("1 m to 2 m", [(60, 120)]),
    ("1 min 5 s to 1 min 20 s", [(65, 80)]),
    ("1m5s to 1m20s", [(65, 80)]),
    ("1:02:03.5 -> 1:02:04", [(3723.5, 3724)]),
    ('{"start": 65, "end": 80}', [(65, 80)]),
    ('{"start":65,"end":80}', [(65, 80)]),
    ('{"start_time": "1:05", "end_time": "1:20"}', [(65, 80)]),
    ("2:00-2:10, 1:05-1:20", [(65, 80), (120, 130)]),
    ("[[0, 5], [3, 8]]", [(0, 8)]),
    ("65 80", []),
    ("65", []),
    ("at 1:05", []),
    ("", []),
    ("soon after the start", []),
    ("80-65", []),
    ("65-65", []),
    ("-5 to 3", []),
    ("1:05-1:20, 2:00", []),
    ("5 km to 6 km", []),
    ("0 to 9e999", []),
    ("3, 5 and 8", []),
    (HUGE, []),
]


@pytest.mark.parametrize("text, wanted", SPANS)
def test_spans_are_read_as_people_write_them(text, wanted):
    assert time_span.spans(text) == wanted


def test_overlap_is_that_of_a_drawing():
    """Two sets of spans drawn on a line of tenths of a second, and counted."""
    rng = random.Random(0)
    for _ in range(300):
        sets, lines = [], []
        for _ in range(2):
            pairs = [sorted(rng.sample(range(60), 2)) for _ in range(rng.randint(1, 4))]
            sets.append(time_span.spans(", ".join(f"{a} to {b}" for a, b in pairs)))
            line = np.zeros(600, bool)
            for a, b in pairs:
                line[10 * a : 10 * b] = True
            lines.append(line)
        both, either = (lines[0] & lines[1]).sum(), (lines[0] | lines[1]).sum()
        assert time_span.iou(*sets) == pytest.approx(both / either)


def test_a_span_earns_its_overlap():
    texts = ["<answer>1:00-1:10</answer>", "<answer>1:05-1:15</answer>", "1:00-1:10", "<answer>x"]
    got = time_span.reward([scored(text, "60 to 70 s") for text in texts])
    assert [parts["iou"] for parts in got] == pytest.approx([1, 1 / 3, 0, 0])
    assert [parts["hit"] for parts in got] == [1, 0, 0, 0]
    assert time_span.reward([scored(texts[0], "at once")]) == [None]


TEXTS = [
    ("The Denver Broncos", "Denver Broncos"),
    ("broncos, DENVER!", "Denver Broncos"),
    ("the red pad", "a red lily pad"),
    ("red red red", "red"),
    ("", "red"),
    ("a", "the"),
    ("it's 3.5%", "its 35"),
    ("a man walks into the theatre", "The man's walk, an hour later"),
    ("r\u00e9sum\u00e9 \u2014 caf\u00e9", "caf\u00e9"),
    ("\u7ea2\u8272 \u7684", "\u7ea2\u8272"),
    ("\U0001f3ac film", "film"),
    (HUGE, "7"),
]


@pytest.mark.parametrize("given, wanted", [*TEXTS, *(pair[::-1] for pair in TEXTS)])
def test_f1_is_squads(given, wanted):
    """As transformers has it from the official script."""
    (parts,) = free_text.reward([scored(f"<answer>{given}</answer>", wanted)])
    assert parts["f1"] == pytest.approx(squad_metrics.compute_f1(wanted, given))
    assert parts["exact"] == squad_metrics.compute_exact(wanted, given)


def test_no_answer_earns_nothing_where_the_reference_is_an_article():
    texts = ("It is A.", "<answer></answer>", "<answer>A</answer>", "<answer>B</answer>")
    parts = free_text.reward([scored(text, "A") for text in texts])
    assert [(p["total"], p["exact"]) for p in parts] == [(0, 0), (0, 0), (1, 1), (0, 0)]


FORMS = {
    "": 0,
    "42": 0,
    "<answer>42": 0,
    "42</answer>": 0,
    "<think>42</think>": 0,
    "<answer></answer>": 0,
    "<answer>42</answer>": 1,
    "<answer>\n42\n</answer>": 1,
    "<think><answer>41</answer></think><answer>42</answer>": 1,
    "<answer>42</answer><answer>41</answer>": 0,
    "<answer>42</answer>" + HUGE: 1,
    "<ANSWER>42</ANSWER>": 0,
}


@pytest.mark.parametrize("name", ["numeric", "time_span", "free_text"])
@pytest.mark.parametrize("text", FORMS, ids=lambda text: text[:60])
def test_only_the_last_answer_in_tags_counts(name, text):
    span = name == "time_span"
    text = text.replace("42", "0-42").replace("41", "43-44") if span else text
    (parts,) = rewards.REWARDS[name]([scored(text, "0-42" if span else "42")])
    assert parts["total"] == FORMS[text.replace("0-42", "42").replace("43-44", "41")]


def test_a_boxed_answer_counts_where_it_was_asked_for():
    text = r"<think>40?</think> It is \boxed{42}."
    for template, total in (("boxed", 1), ("think", 0)):
        assert numeric.reward([scored(text, "42", template)])[0]["total"] == total
