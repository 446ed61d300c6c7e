"""Rule-based reward of questions about videos: is the form right, and is the answer?

Source: arXiv:2507.07966 section 3 (format and accuracy); Long-RL examples/reward_function/r1v.py.
"""

import re
from collections.abc import Sequence

from longrl_jax.config import pick
from longrl_jax.types import Scored

FORMAT_WEIGHT = 0.5
"""Share of the format in the total, as in Long-RL."""
FORMS = {
    "think": re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL),
    "direct": re.compile(r"\s*<answer>.*?</answer>\s*", re.DOTALL),
}
"""What an answer must look like, by data.template."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
TAGS = re.compile(r"</?(?:think|answer)>")
LETTER = re.compile(r"\(?([A-Z])(?:[.):](?:\s.*)?)?", re.DOTALL)
"""A choice: "B", "(B)", "B." and "B. the red pad" are all B."""


def reward(items: Sequence[Scored]) -> list[dict[str, float]]:
    """Returns `format` (0 or 1), `accuracy` (0 or 1) and their weighted `total`."""
    results = []
    for item in items:
        form = has_form(item.text, item.template)
        right = is_right(item.text, item.example.answer)
        total = FORMAT_WEIGHT * form + (1 - FORMAT_WEIGHT) * right
        results.append({"total": total, "format": float(form), "accuracy": float(right)})
    return results


def accuracy(items: Sequence[Scored]) -> list[dict[str, float]]:
    """Returns `accuracy` (0 or 1) and `total`, -1 or 1; the form has no say.

    Source: arXiv:2503.14476 equation 7 (DAPO); Long-RL examples/reward_function/dapo.py.
    """
    right = [is_right(item.text, item.example.answer) for item in items]
    return [{"total": 2.0 * x - 1.0, "accuracy": float(x)} for x in right]


def has_form(text: str, template: str = "think") -> bool:
    """Whether a text is one <think> part and one <answer> part, each tag once, nothing else.

    With template="direct": one <answer> part alone.
    """
    num_tags = 4 if template == "think" else 2
    form = pick(FORMS, template, "data.template")
    return form.fullmatch(text) is not None and len(TAGS.findall(text)) == num_tags


def is_right(text: str, answer: str) -> bool:
    """Whether the last <answer> of a text is the reference answer.

    Letters are compared as choices, numbers by value, everything else as words without case.
    Without the tags nothing is right: Long-RL falls back to the whole text, which rewards an
    answer that was never given.
    """
    given = ANSWER.findall(text)
    if not given:
        return False
    return _same(given[-1].strip(), answer.strip())


def _same(given: str, wanted: str) -> bool:
    if re.fullmatch(r"[A-Z]", wanted):
        choice = LETTER.fullmatch(given)
        return choice is not None and choice[1] == wanted
    try:
        return float(given.replace(",", "")) == float(wanted.replace(",", ""))
    except ValueError:
        return _words(given) == _words(wanted)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
