"""Options of a multiple-choice question: a block of lines "A. ...", "B. ..." that ends its text."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
"""Letters of the options, in order; more than ten are in no data set that we know."""
ANY_NUMBER = (
    "Several may be true, or none. Name the letters of all that are, in order, as in A, C; or none."
)
"""Stands in a question of whose options any number may be right."""
OPTION = re.compile(r"\s*\(?([A-J])[.):]\s+(\S.*)", re.DOTALL)
"""A line that begins an option: "A. pad", "A) pad", "(A) pad" and "A: pad"."""


def split_options(question: str) -> tuple[str, list[str]]:
    """Returns the words before the options, and the options without their letters.

    ("Who?\\nA. he\\nB. she") gives ("Who?", ["he", "she"]). A line without a letter belongs to the
    option above it. Without at least two options that end the text: (question, []).
    """
    lines = question.split("\n")
    for start in reversed(range(len(lines))):
        match = OPTION.fullmatch(lines[start])
        if match is None or match[1] != "A":
            continue
        options: list[str] = []
        for line in lines[start:]:
            match = OPTION.fullmatch(line)
            if match is not None and match[1] == LETTERS[len(options) : len(options) + 1]:
                options.append(match[2])
            else:
                options[-1] += f"\n{line}"
        if len(options) > 1:
            return "\n".join(lines[:start]), [option.rstrip() for option in options]
    return question, []


def join_options(stem: str, options: Sequence[str]) -> str:
    """Returns the question that split_options takes apart: the words, then a line an option."""
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, but only {len(LETTERS)} letters; ask of fewer")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([stem, *lines])
