"""Rule-based rewards: what counts as an answer, case by case."""

import pytest

from longrl_jax import rewards
from longrl_jax.rewards import video_qa
from longrl_jax.types import Example, Scored

GOOD = "<think> first red then blue </think> <answer> B </answer>"


def scored(text, answer="B"):
    example = Example(id="1", question="which?", answer=answer)
    return Scored(example=example, text=text, num_tokens=5, finish_reason="stop")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (GOOD, True),
        ("<think>a\nb</think>\n<answer>B</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("well <think>a</think><answer>B</answer>", False),
        ("<think>a</think><answer>B</answer> so B", False),
        ("<answer>B</answer>", False),
        ("<think>a</think><answer>B", False),
        ("<think>a</think><think>b</think><answer>B</answer>", False),
        ("<think>a</think><answer>A</answer><answer>B</answer>", False),
        ("<answer>B</answer><think>a</think>", False),
        ("", False),
    ],
)
def test_form(text, form):
    assert video_qa.has_form(text) is form


def test_the_form_is_the_one_that_was_asked_for():
    assert video_qa.has_form("<answer>B</answer>", "direct")
    assert not video_qa.has_form(GOOD, "direct")
    assert not video_qa.has_form("so <answer>B</answer>", "direct")


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("B", "B", True),
        (" B ", "B", True),
        ("(B)", "B", True),
        ("B.", "B", True),
        ("B. the blue pad", "B", True),
        ("B) the blue pad", "B", True),
        ("b", "B", False),
        ("A", "B", False),
        ("AB", "B", False),
        ("Because", "B", False),
        ("", "B", False),
        ("12", "12.0", True),
        ("1,200", "1200", True),
        ("12.5", "12", False),
        ("twelve", "12", False),
        ("The Red Pad.", "the red pad", True),
        ("red pad", "the red pad", False),
    ],
)
def test_answers(given, answer, right):
    assert video_qa.is_right(f"<think>x</think><answer>{given}</answer>", answer) is right


def test_the_last_answer_counts_and_no_tag_is_no_answer():
    assert video_qa.is_right("<answer>A</answer> no, <answer>B</answer>", "B")
    assert not video_qa.is_right("B", "B")


def test_total_is_half_format_and_half_accuracy():
    texts = [GOOD, GOOD.replace("B", "C"), "<answer>B</answer>", "nonsense"]
    got = video_qa.reward([scored(text) for text in texts])
    assert [parts["total"] for parts in got] == [1.0, 0.5, 0.5, 0.0]
    assert [parts["format"] for parts in got] == [1, 1, 0, 0]
    assert [parts["accuracy"] for parts in got] == [1, 0, 1, 0]


def test_rewards_add_up_by_weight_and_an_unjudged_item_is_none(monkeypatch):
    def judge(items):
        return [None if "?" in item.text else {"total": 2.0, "length": 7.0} for item in items]

    monkeypatch.setitem(rewards.REWARDS, "judge", judge)
    got = rewards.score([scored(GOOD), scored("?")], {"video_qa": 1.0, "judge": 0.25})
    want = {"total": 1.5, "video_qa/format": 1, "video_qa/accuracy": 1, "judge/length": 7}
    assert got == [want, None]


def test_a_reward_that_is_not_finite_or_not_complete_is_caught(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "nan", lambda items: [{"total": float("nan")}])
    assert rewards.score([scored(GOOD)], {"nan": 1.0}) == [None]
    monkeypatch.setitem(rewards.REWARDS, "short", lambda items: [])
    with pytest.raises(ValueError, match="'short' returned 0 results for 1 items"):
        rewards.score([scored(GOOD)], {"short": 1.0})
    with pytest.raises(ValueError, match="choose one of"):
        rewards.score([scored(GOOD)], {"vide_qa": 1.0})


def test_accuracy_alone_is_plus_or_minus_one():
    """As in DAPO; the form has no say, but an answer without its tags is none."""
    texts = [GOOD, "<answer>B</answer>", "<answer>A</answer>", "B"]
    got = video_qa.accuracy([scored(text) for text in texts])
    assert [parts["total"] for parts in got] == [1, 1, -1, -1]
    assert [parts["accuracy"] for parts in got] == [1, 1, 0, 0]
