"""Scorers of the field's benchmarks: what their public code makes of an answer, and what we do.

A scorer is (text of the answer, example) -> 1.0 or 0.0, or None where it cannot say. `strict` is
ours: the form that was asked for, and in it the letter alone. The others are named after the public
code whose verdict they give, its oddities included.
"""

import re
from collections.abc import Callable

from longrl_jax.rewards import math_answer, video_qa
from longrl_jax.types import Example

Scorer = Callable[[str, Example], float | None]

ANSWER = re.compile(r"<answer>(.*?)</answer>")
"""Without DOTALL, as in Long-RL: an answer of two lines is not found."""
CLAUSE = "Therefore the final answer is:"
AFTER_CLAUSE = re.compile(rf"<answer>{CLAUSE} (.*?)</answer>")


def strict(text: str, example: Example) -> float:
    """1.0 where a text is at most one <think> part and one <answer> part, and that is right alone.

    A letter must be the letter, without a dot or words; anything else is compared as in video_qa.
    """
    if not any(video_qa.has_form(text, template) for template in ("think", "direct")):
        return 0.0
    given = video_qa.ANSWER.findall(text)[0].strip()
    if re.fullmatch(r"[A-Z]", example.answer):
        return float(given == example.answer)
    return float(video_qa.is_right(text, example.answer))


def longvideo_reason(text: str, example: Example) -> float:
    """Source: Long-RL longvideo-reason/eval.py `accuracy_reward`.

    Equality by the byte of what stands in the first <answer> of one line, of the whole text where
    there is none, with the reference. math-verify is asked first, but finds nothing to compare in
    a reference that is a letter (tests/rewards/test_scorers.py); of another it decides.
    """
    match = (AFTER_CLAUSE if CLAUSE in text else ANSWER).search(text)
    given = (match[1] if match else text).strip()
    if given == example.answer:
        return 1.0
    if re.fullmatch(r"[A-Z]", example.answer):
        return 0.0
    return float(math_answer.verdicts([(example.answer, given)]) == ["right"])
