"""Reward of short answers in words: how many words do answer and reference share?

Source: the F1 of SQuAD, arXiv:1606.05250 section 6.1. Case, punctuation and the articles a, an, the
do not count. Words are what spaces part: for languages without spaces take the reward `judge`.
"""

import collections
import re
import string
from collections.abc import Sequence

from longrl_jax.rewards import answers
from longrl_jax.types import Scored

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def reward(items: Sequence[Scored]) -> list[dict[str, float]]:
    """Returns `f1` (0 to 1), also as `total`, and `exact` (0 or 1).

    A text that gives no answer has 0, also where the reference, "A", has no word that counts.
    """
    results = []
    for item in items:
        answer = answers.given(item)
        given, wanted = words(answer), words(item.example.answer)
        score = f1(given, wanted) if answer else 0.0
        exact = float(bool(answer) and given == wanted)
        results.append({"total": score, "f1": score, "exact": exact})
    return results


def f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Returns the harmonic mean of precision and recall of words; 1 if there are none on either
    side, 0 if on one."""
    if not given or not wanted:
        return float(given == wanted)
    shared = (collections.Counter(given) & collections.Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


def words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()
