r"""Reward of mathematics: is the answer in \boxed{} worth the same as the reference?

Source: EasyR1 and Long-RL examples/reward_function/math.py (form and weight). Whether two
expressions are equal is for math-verify (Hugging Face) to say, in processes of its own
(math_verdicts.py): what a policy writes may take for ever to evaluate, 9^{9^{9^9}} for one.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from longrl_jax.types import Scored

FORMAT_WEIGHT = 0.1
"""Share of the format in the total, as in Long-RL's reward of mathematics."""
TEMPLATE = "boxed"
"""data.template that asks for the form which is judged here."""
THINK = re.compile(r"\s*<think>.*?</think>(.*)", re.DOTALL)
TAGS = re.compile(r"</?think>")
BOX = r"\boxed{"
MAX_CPU_S = 3
"""Of one comparison, a whole number; an ordinary one takes 0.01 to 0.3."""
JUDGE = Path(__file__).with_name("math_verdicts.py")


def reward(items: Sequence[Scored]) -> list[dict[str, float]]:
    """Returns `format`, `accuracy` (0 or 1) and their weighted `total`, and `gave_up`.

    gave_up is 1 where the limits of math_verdicts.py ended the comparison: the answer is wrong.
    """
    for item in items:
        if item.template != TEMPLATE:
            raise ValueError(
                f"the reward math_answer judges the form that data.template={TEMPLATE} asks for, "
                f"not {item.template!r}; set data.template={TEMPLATE}"
            )
    words = verdicts([(_bare(i.example.answer), boxed(i.text)) for i in items])
    results = []
    for item, word in zip(items, words, strict=True):
        form, right = has_form(item.text), word == "right"
        total = FORMAT_WEIGHT * form + (1 - FORMAT_WEIGHT) * right
        parts = {"format": form, "accuracy": right, "gave_up": word == "gave up"}
        results.append({"total": total} | {name: float(x) for name, x in parts.items()})
    return results


def has_form(text: str) -> bool:
    r"""Whether a text is one <think> part and, after it, words with one \boxed{...}."""
    match = THINK.fullmatch(text)
    if match is None or len(TAGS.findall(text)) != 2:
        return False
    return match[1].count(BOX) == 1 and bool(boxed(match[1]))


def boxed(text: str) -> str:
    r"""Returns what stands in the last \boxed{...} of a text; "" if it does not close."""
    start = text.rfind(BOX)
    if start < 0:
        return ""
    depth = 0
    for i, letter in enumerate(text[start:], start):
        depth += (letter == "{") - (letter == "}")
        if letter == "}" and depth == 0:
            return text[start + len(BOX) : i].strip()
    return ""


def verdicts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Says for every (reference, answer) whether they have the same value: right, wrong, gave up.

    An empty answer is wrong; what is equal to the letter is right without being asked about.
    """
    known = {(a, b): "right" if a == b and b else "wrong" for a, b in pairs}
    asked = [(a, b) for a, b in known if b and a != b]
    if asked:
        done = subprocess.run(
            [sys.executable, "-P", str(JUDGE), str(MAX_CPU_S)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{JUDGE} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
        known |= zip(asked, json.loads(done.stdout), strict=True)
    return [known[pair] for pair in pairs]


def _bare(answer: str) -> str:
    r"""A reference may stand in \boxed{} or between dollars."""
    return (boxed(answer) or answer).strip().strip("$").strip()
