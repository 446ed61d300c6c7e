"""Scorers of the field's benchmarks: what their public code makes of an answer, and what we do.

A scorer is (text of the answer, example) -> 0 to 1, or None where it cannot say. `strict` is ours:
the form that was asked for, and in it the letter alone. The others give the verdict of the public
code that they name, its oddities included; where that draws an option at random, the share of draws
that are right. What they give was computed with that code itself (tests/witness/scorers.py).
"""

import re
from collections.abc import Callable, Sequence

from longrl_jax.options import LETTERS, split_options
from longrl_jax.rewards import video_qa
from longrl_jax.types import Example

Scorer = Callable[[str, Example], float | None]

REASONING = ("<think>", "</think>"), ("<analysis>", "</analysis>")
"""lmms-eval's default --reasoning_tags."""
ANSWER_LINE = re.compile(r"<answer>(.*?)</answer>")
"""Without DOTALL, as in Long-RL: an answer of two lines is not found."""
CLAUSE = "Therefore the final answer is:"
AFTER_CLAUSE = re.compile(rf"<answer>{CLAUSE} (.*?)</answer>")
BEST = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
"""What LongVideoBench's code takes out of an answer, in this order."""
PHRASES = (
    *("answer is", "the answer is", "correct answer is", "the correct answer is"),
    *("best answer is", "the best answer is", "correct option is", "the correct option is"),
    *("best option is", "the best option is", "choice is", "the choice is"),
    *("correct choice is", "the correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "\uc635\uc158", "\uc815\ub2f5\uc740", "\ub2f5\uc740"),
    *("\ub2f5:", "\u7b54\u6848\u662f", "\u7b54\u6848\u4e3a", "\u9009", "\u7b54\u3048\u306f"),
)
"""What lmms-eval looks for an option behind, in lower case; Korean, Chinese and Japanese too."""
MARKS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
"""How lmms-eval finds an option in a text, and how far it trusts each way."""
TRUST_START, TRUST_END, TRUST_PHRASE, TRUST_ANYWHERE = 10, 9, 7, 0


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


def said(scorer: Scorer) -> Scorer:
    """Returns the scorer of what stands in the last <answer> of a text, if it has one.

    The public code expects a bare answer, and reasoning at most in <think>; the tags that our
    prompts ask for around the answer are not in what it gets.
    """

    def of_answer(text: str, example: Example) -> float | None:
        given = video_qa.ANSWER.findall(text)
        return scorer(given[-1] if given else text, example)

    return of_answer


def without_reasoning(text: str) -> str:
    """Takes reasoning out. Source: lmms-eval api/reasoning.py `strip_reasoning_tags`.

    A part that never ends stays; without a beginning, what follows its last end is kept.
    """
    for start, end in REASONING:
        while start in text and end in text[text.find(start) :]:
            begin = text.find(start)
            text = text[:begin] + text[text.find(end, begin) + len(end) :]
        if end in text and start not in text:
            text = text.rpartition(end)[2]
    return text.strip()


def longvideo_reason(text: str, example: Example) -> float:
    """Source: Long-RL longvideo-reason/eval.py `accuracy_reward`.

    Equality by the byte of what stands in the first <answer> of one line, of the whole text where
    there is none, with the reference. math-verify, which is asked first there, finds nothing to
    compare in a reference that is a letter (tests/witness/scorers.py), and these are.
    """
    match = (AFTER_CLAUSE if CLAUSE in text else ANSWER_LINE).search(text)
    return float((match[1] if match else text).strip() == example.answer)


def video_mme(text: str, example: Example) -> float:
    """Source: lmms-eval tasks/videomme `videomme_process_results`, _task_utils/mcq_extract.py."""
    return float(_extracted(without_reasoning(text), "ABCD") == example.answer)


def longvideobench(text: str, example: Example) -> float:
    """Source: lmms-eval tasks/longvideobench `parse_multi_choice_response`.

    The first capital A to E anywhere in the text, "A man" and "Best" too; without one a random
    option.
    """
    text = without_reasoning(text)
    for words in BEST:
        text = text.replace(words, "")
    match = re.search("[ABCDE]", text)
    if match is None:
        return 1 / len(_options(example))
    return float(match[0] == example.answer)


def next_qa(text: str, example: Example) -> float:
    """Source: lmms-eval tasks/nextqa `parse_multi_choice_response` (after MMMU's).

    (B) counts before "B " and that before "B."; of several the last one, where letters without
    brackets are looked for between spaces only, so that of those the first option wins. A text of
    more than five words without a letter is searched for the options' words. Then a random option.
    """
    options = _options(example)
    text = without_reasoning(text)
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, where in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [c for c in LETTERS[: len(options)] if form.format(c) in text]
        if found:
            return float(max(found, key=lambda c: text.rfind(where.format(c))) == example.answer)
    if len(text.split()) > 5:
        lower = text.lower()
        places = {
            c: lower.rfind(o.lower())
            for c, o in zip(LETTERS, options, strict=False)
            if o.lower() in lower
        }
        if places:
            return float(max(places, key=lambda c: places[c]) == example.answer)
    return 1 / len(options)


def perception_test(text: str, example: Example) -> float:
    """Source: lmms-eval tasks/perceptiontest/val: the first A to D that is a word by itself."""
    match = re.search(r"\b([A-D])\b", without_reasoning(text))
    return float(match is not None and match[1] == example.answer)


def vnbench(text: str, example: Example) -> float:
    """One rotation. Source: joez17/VideoNIAH evaluation/eval.py.

    Up to the first dot, the first letter of the alphabet that is anywhere in the text: "B, not A"
    is A. Reasoning is taken out before, which that code knows nothing of.
    """
    text = without_reasoning(text).split(".")[0]
    given = next((letter for letter in "ABCD" if letter in text), text)
    return float(given == example.answer)


def same_words(text: str, example: Example) -> float:
    """Whether a text has the words of the reference, without case: ActivityNet-QA's accuracy.

    Source: arXiv:1906.02467 section 5 (accuracy over a closed set of answers).
    """
    return float(video_qa.is_right(f"<answer>{without_reasoning(text)}</answer>", example.answer))


def _options(example: Example) -> Sequence[str]:
    options = split_options(example.question)[1]
    if not options:
        raise ValueError(
            f"the question of {example.id!r} lists no options as lines 'A. ...', 'B. ...', but "
            "this scorer chooses among them"
        )
    return options


def _extracted(text: str, letters: str) -> str:
    """The option that lmms-eval's `extract_mcq_answer` reads in a text; "" if it finds none."""
    text = text.strip()
    for mark in (*",.!?;:'", '"'):
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found = []  # (trust, place, letter): the highest counts, of equals the one found first
    for form, trust in MARKS:
        found += [(trust, text.rfind(form.format(c)), c) for c in letters if form.format(c) in text]
    for phrase in PHRASES:
        begin = text.lower().find(phrase)
        if begin >= 0:
            places = [(text.find(c, begin + len(phrase)), c) for c in letters]
            found += [(TRUST_PHRASE, place, c) for place, c in places if place >= 0]
    for c in letters:
        if bare.startswith(c) and not bare[1:2].isalpha():
            found.append((TRUST_START, 0, c))
    for c in letters:
        if bare.endswith(c) and not bare[-2:-1].isalpha():
            found.append((TRUST_END, len(text) - 1, c))
    if not found:
        found = [(TRUST_ANYWHERE, text.rfind(c), c) for c in letters if c in text]
    return max(found, key=lambda one: one[:2])[2] if found else ""
