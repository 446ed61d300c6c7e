"""What servers reply, read strictly: JSON objects, captions, reasonings."""

import json
import re
from typing import Any

THOUGHT = re.compile(r"\A.*</think>", re.DOTALL)
"""What a reasoning model says before its reply."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LEAK = re.compile(
    r"\bcaptions?\b|\btranscripts?\b|"
    r"\b(?:according to|based on) the (?:story|text|notes?|lines?|narration|description)s?\b|"
    r"\b(?:in|from) the (?:text|notes|narration|description)\b|"
    r"\bthe (?:text|notes?|narration|description) (?:says|states|mentions|tells|notes)\b",
    re.IGNORECASE,
)
"""Words that tell that nobody watched a film."""
MOST_LEVELS = 20
"""Of a reply's JSON: what is left out is written down with the draft, which must be possible."""
NO_JSON = "no JSON object in"
"""Begins what is said of a reply without one."""
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|\Z)")


def json_object(text: str) -> dict[str, Any]:
    """Returns the JSON object of a reply, with or without a code fence and thoughts before it.

    Raises ValueError.
    """
    said = THOUGHT.sub("", text).strip()
    start = said.find("{")
    if start < 0:
        raise ValueError(f"{NO_JSON} {_shown(text)}")
    try:
        tree, end = json.JSONDecoder().raw_decode(said[start:])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}) in {_shown(text)}") from None
    if _is_deep(tree):
        raise ValueError(f"JSON nested over {MOST_LEVELS} deep in {_shown(text)}")
    if said[start + end :].strip(" \n\t`"):
        raise ValueError(f"more than one JSON object in {_shown(text)}")
    return tree


def _is_deep(tree: Any) -> bool:
    level = [tree]
    for _ in range(MOST_LEVELS):
        parts = [x.values() if isinstance(x, dict) else x for x in level]
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
    return bool(level)


def check_json(text: str) -> ValueError | None:
    """For chat.ask: a reply that holds no whole JSON object is asked for again."""
    try:
        json_object(text)
    except ValueError as error:
        return error
    return None


def check_words(text: str) -> ValueError | None:
    """For chat.ask: a reply without words is asked for again."""
    return None if words(text) else ValueError(f"no words in {_shown(text)}")


def words(text: str) -> str:
    """Returns what a reply says, in one line, thoughts and the tags of an answer taken off."""
    said = THOUGHT.sub("", text)
    match = ANSWER.search(said)
    return " ".join((match[1] if match else said).split())


def whole_sentences(text: str) -> str:
    """Returns a text that was cut off up to the end of its last sentence; "" if it has none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def text_of(tree: Any, field: str) -> str:
    """Returns a field's words; raises ValueError where it lacks, is no text or is empty."""
    value = tree.get(field) if isinstance(tree, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} must be a text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field}={_shown(value)} is no valid Unicode") from None
    return " ".join(value.split())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-37:]}"
