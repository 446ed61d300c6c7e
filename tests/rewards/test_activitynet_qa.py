"""The judge of open answers: what it is asked, and which replies are verdicts."""

import json
from pathlib import Path

import pytest
from chat_server import ChatServer, status

from longrl_jax.config import ChatConfig
from longrl_jax.rewards import activitynet_qa
from longrl_jax.types import Example, Scored

WITNESS = json.loads((Path(__file__).parents[1] / "witness" / "scorers.json").read_text())
KEPT = {"{'pred': 'yes', 'score': '3'}", "{'pred': 'yes', 'score': 4.8}"}


def item(id, text, answer="dark blue"):
    example = Example(id=id, question="What colour is it?", answer=answer)
    return Scored(example=example, text=text, num_tokens=1, finish_reason="stop")


def test_replies_are_read_as_by_lmms_eval():
    """Where that calls an answer wrong because it cannot read the reply, there is no verdict."""
    for reply, judged in zip(WITNESS["replies"], WITNESS["judged"], strict=True):
        want = None
        if judged is not None and judged[0] in ("yes", "no"):
            want = float(judged[0] == "yes"), float(judged[1])
        assert activitynet_qa.verdict(reply) == want, reply


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        ('<think>{"pred": "no", "score": 1}?</think>{"pred": "yes", "score": 5}', (1, 5)),
        ('{"pred": "yes", "score": 6}', None),
        ('{"pred": "yes", "score": -1}', None),
        ('{"pred": "yes", "score": 5', None),
    ],
)
def test_other_replies(reply, want):
    assert activitynet_qa.verdict(reply) == want


def test_answers_are_judged_once_and_failures_are_no_verdict(tmp_path):
    items = [
        item("a", "<think>It is red</think><answer>navy</answer>"),
        item("b", "<answer>red</answer>"),
        item("c", "no idea"),
    ]

    def answer(asked):
        sheet = json.loads(asked.body["messages"][1]["content"])
        assert sheet["right answer"] == "dark blue" and sheet["question"] == "What colour is it?"
        said = sheet["answer of the student"]
        if said == "no idea":
            return status(500)
        return '{"pred": "yes", "score": 4}' if said == "navy" else "{'pred': 'no', 'score': 0}"

    with ChatServer(answer) as server:
        cfg = ChatConfig(base_url=server.base_url, model="judge", max_tries=1)
        judged = activitynet_qa.judged(items, cfg, tmp_path / "judge.jsonl")
        assert judged == [
            {"judge": 1.0, "judge_mark": 0.8},
            {"judge": 0.0, "judge_mark": 0.0},
            {"judge": None, "judge_mark": None},
        ]
        paid = server.num_paid
        assert activitynet_qa.judged(items[:2], cfg, tmp_path / "judge.jsonl") == judged[:2]
        assert server.num_paid == paid == 2
