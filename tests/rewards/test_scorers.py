"""Scorers against the public code that they name: its verdicts, stored with its versions."""

import json
from pathlib import Path

import pytest

from longrl_jax.options import LETTERS, join_options
from longrl_jax.rewards import scorers
from longrl_jax.types import Example

WITNESS = json.loads((Path(__file__).parents[1] / "witness" / "scorers.json").read_text())
OPTIONS = {"video_mme": 4, "longvideobench": 4, "next_qa": 5, "perception_test": 4}


def asked(answer, number=4):
    question = join_options("What is it?", WITNESS["options"][:number])
    return Example(id="q", question=question, answer=answer)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_verdict_is_that_of_lmms_eval(name):
    scorer, number = getattr(scorers, name), OPTIONS[name]
    read = WITNESS["read"][name]
    assert len(read) == len(WITNESS["texts"]) > 400
    seen = set()
    for text, letters in zip(WITNESS["texts"], read, strict=True):
        for answer in LETTERS[:number]:
            share = letters.count(answer) / len(letters) if letters else 0.0
            assert scorer(text, asked(answer, number)) == share, (text, letters, answer)
            seen.add(share)
    assert seen == ({0, 1, 1 / number} if name in ("longvideobench", "next_qa") else {0, 1})


def test_reasoning_is_taken_out_as_in_lmms_eval():
    for text, cleaned in zip(WITNESS["texts"], WITNESS["without_reasoning"], strict=True):
        assert scorers.without_reasoning(text) == cleaned, text


def test_math_verify_has_no_say_about_letters():
    """So that equality, which Long-RL's code falls back to, is the verdict."""
    assert WITNESS["found_by_math_verify"] == 0


@pytest.mark.parametrize(
    ("text", "right"),  # worked out by reading accuracy_reward of longvideo-reason/eval.py
    [
        ("<think>x</think><answer>B</answer>", True),
        ("<answer> B </answer>", True),
        ("<answer>B.</answer>", False),
        ("<answer>(B)</answer>", False),
        ("<answer>b</answer>", False),
        ("<answer>B. the blue pad</answer>", False),
        ("<answer>B\n</answer>", False),  # no DOTALL: the whole text is compared
        ("<answer>\nB</answer>", False),
        (" B \n", True),
        ("B", True),
        ("The answer is B", False),
        ("<think>B</think>", False),
        ("<answer>B</answer> and more", True),
        ("<answer>A</answer><answer>B</answer>", False),
        ("<answer>B</answer><answer>A</answer>", True),
        ("<answer>Therefore the final answer is: B</answer>", True),
        ("<answer>Therefore the final answer is:B</answer>", False),
        ("<think>Therefore the final answer is: A</think><answer>B</answer>", False),
        ("Therefore the final answer is: B <answer>B</answer>", False),
        ("", False),
    ],
)
def test_long_rl_compares_bytes(text, right):
    assert scorers.longvideo_reason(text, asked("B")) == right


@pytest.mark.parametrize(
    ("text", "letter"),  # worked out by reading evaluation/eval.py of VideoNIAH
    [
        ("B", "B"),
        ("B. A pad", "B"),
        ("D, not A", "A"),
        ("I say C.", "C"),
        ("C and B", "B"),
        ("It is D", "D"),
        ("Best is D", "B"),
        ("b", ""),
        (".B", ""),
        ("", ""),
        ("<think>A</think>B", "B"),
    ],
)
def test_vnbench_takes_the_first_letter_of_the_alphabet(text, letter):
    for answer in "ABCD":
        assert scorers.vnbench(text, asked(answer)) == (answer == letter)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>A or B</think><answer>B</answer>", True),
        ("<answer>B</answer>", True),
        ("<think>x</think>\n<answer> B </answer>\n", True),
        ("<answer>B.</answer>", False),
        ("<answer>B</answer> I am sure", False),
        ("<answer>A</answer><answer>B</answer>", False),
        ("<think>x</think>B", False),
        ("B", False),
        ("<answer>C</answer>", False),
    ],
)
def test_strict_wants_one_answer_and_one_letter(text, right):
    assert scorers.strict(text, asked("B")) == right


def test_strict_compares_words_where_there_is_no_letter():
    example = Example(id="q", question="What colour?", answer="dark blue")
    assert scorers.strict("<answer>Dark blue.</answer>", example) == 1
    assert (
        scorers.strict("dark blue", example)
        == scorers.strict("<answer>blue</answer>", example)
        == 0
    )
    assert scorers.same_words("Dark blue.", example) == 1
    assert scorers.same_words("<think>red</think> dark blue", example) == 1
    assert scorers.same_words("blue", example) == 0


def test_what_is_said_is_the_last_answer_or_all():
    """NExT-QA's code draws an option at random where the tags stay around the letter."""
    for scorer in (scorers.next_qa, scorers.said(scorers.next_qa)):
        assert scorer("B", asked("B", 5)) == 1
    tagged = "<think>A</think><answer>C</answer>"
    assert scorers.next_qa(tagged, asked("C", 5)) == 1 / 5
    assert scorers.said(scorers.next_qa)(tagged, asked("C", 5)) == 1
    assert scorers.said(scorers.video_mme)("<answer>A</answer><answer>B</answer>", asked("B")) == 1


def test_scorers_that_choose_among_options_want_them():
    with pytest.raises(ValueError, match="'q' lists no options"):
        scorers.next_qa("B", Example(id="q", question="What?", answer="B"))
