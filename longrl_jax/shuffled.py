"""The same question with its options in another order: does the policy know, or like a letter?

An option keeps its words and gets another letter; everything else of the question stays as it is.
"""

import dataclasses
import re
import zlib

import numpy as np

from longrl_jax.options import LETTERS, split_options
from longrl_jax.types import Example

LABEL = re.compile(r"\s*\(?[A-J][.):]\s+")
"""What stands before the words of an option in a block of lines."""
INLINE = re.compile(r" = ([A-J])(?= |$)")
"""What stands behind an option in "Which pad ? red = A blue = B"."""
PINNED = re.compile(
    r"\babove\b|\b(?:all|none|both|neither|any) of (?:these|those|them|the (?:others?|options))\b",
    re.IGNORECASE,
)
"""Options about the other options: they keep their place."""
NAMES_LETTERS = re.compile(
    r"\b[A-J]\b\)?,?\s*(?:and|&|or|,)\s*\(?\b[A-J]\b|\b(?:options?|answers?|choices?)\s+\(?[A-J]\b|"
    r"\b(?:both|neither|only)\s+\(?[A-J]\b"
)
"""Options that say other options' letters: such a question is left alone."""


def order_of(example: Example, *, seed: int, number: int) -> tuple[int, ...] | None:
    """Returns which option stands at each letter in the shuffle of a number, drawn evenly.

    It comes from (seed, id of the question, number) alone; the order of the file may be drawn, too.
    None where the options cannot be told for sure, one of them says letters, fewer than two may
    move ("None of the above" may not), the answer is no letter of theirs, or media stand among
    them.
    """
    places = spans(example.question)
    letter = LETTERS.find(example.answer) if len(example.answer) == 1 else -1
    if not places or not 0 <= letter < len(places):
        return None
    texts = [example.question[start:end] for start, end in places]
    moving = [i for i, text in enumerate(texts) if not PINNED.search(text)]
    if len(moving) < 2 or any(NAMES_LETTERS.search(text) for text in texts):
        return None
    if any(file.at > places[0][0] for file in example.media):
        return None
    entropy = [seed, zlib.crc32(example.id.encode()), number]
    order = list(range(len(places)))
    for place, option in zip(
        moving, np.random.default_rng(entropy).permutation(moving), strict=True
    ):
        order[place] = int(option)
    return tuple(order)


def shuffled(example: Example, order: tuple[int, ...]) -> Example:
    """Returns the question with option order[i] at letter i; the answer's letter follows.

    The reference reasoning, which may say letters, is left out.
    """
    question = example.question
    places = spans(question)
    assert sorted(order) == list(range(len(places))), f"{order} is no order of {len(places)}"
    pieces, used = [], 0
    for (start, end), option in zip(places, order, strict=True):
        first, last = places[option]
        pieces += [question[used:start], question[first:last]]
        used = end
    answer = LETTERS[order.index(LETTERS.index(example.answer))]
    return dataclasses.replace(
        example, question="".join([*pieces, question[used:]]), answer=answer, reasoning=""
    )


def options_of(question: str) -> list[str]:
    """Returns the words of a question's options, from A on; [] without options."""
    return [question[start:end] for start, end in spans(question)]


def spans(question: str) -> list[tuple[int, int]]:
    """Returns where the words of every option stand, [start, end), from A on; [] without options.

    Two forms are known: a block of lines that ends the question (options.split_options), and
    "red = A blue = B" behind its last question mark.
    """
    stem, options = split_options(question)
    if not options:
        return _inline(question)
    places, position = [], len(stem) + 1 if len(stem) < len(question) and stem else 0
    for option in options:
        label = LABEL.match(question, position)
        assert label is not None, f"no label at {position} of {question!r}"
        start = label.end()
        assert question.startswith(option, start), f"{option!r} is not at {start} of {question!r}"
        places.append((start, start + len(option)))
        position = question.find("\n", start + len(option)) + 1
    return places


def _inline(question: str) -> list[tuple[int, int]]:
    start = question.rfind("? ") + 2
    places = []
    for mark, letter in zip(INLINE.finditer(question, start), LETTERS, strict=False):
        if mark[1] != letter or start >= mark.start():
            return []
        places.append((start, mark.start()))
        start = mark.end() + 1
    return places if len(places) > 1 and start > len(question) and question.rfind("? ") > 0 else []
