"""The captions of a film as one story with times, which fits what a model reads at once."""

import math
from collections.abc import Generator, Sequence
from typing import Any

from longrl_jax.chat import Failure, Request
from longrl_jax.data.generate import clock, replies, texts, work
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item

TEXTS = ("condense",)
TOKEN_CHARACTERS = 3.0
"""Characters of a token as we count: English has 4 to 5, so we count too many, never too few."""
WORD_TOKENS = 2.0
"""Tokens that a word of a condensed story may take by that count."""
MOST_LEVELS = 4
SLACK_S = 1.0
"""Times are told in whole seconds."""
NOTES_SCHEMA = {
    "type": "object",
    "properties": {
        "notes": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("start", "end", "text")},
                "required": ["start", "end", "text"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["notes"],
    "additionalProperties": False,
}


def steps(film: str, before: list[Item], cfg: GenerateConfig) -> Generator[Any, Any, Any]:
    """Returns (one item: the story and its lines, rejects).

    A story over merge.story_tokens is cut into parts of the length of a reply; each is condensed,
    level after level until the whole fits.
    """
    if not before:
        return [], []
    lines, levels, limit = list(before), 0, cfg.merge.story_tokens
    while (size := num_tokens(story(lines))) > limit:
        if not cfg.merge.server:
            why = f"{size} tokens, over merge.story_tokens={limit}, and no merge.server"
            return [], [work.reject("story: too long", why)]
        if levels == MOST_LEVELS:
            why = f"{size} tokens after {levels} rounds, over merge.story_tokens={limit}"
            return [], [work.reject("story: too long", why)]
        share = max(0.1, min(0.9, 0.8 * limit / size))
        parts = _parts(lines, cfg.merge.max_tokens / share)
        got = yield [_request(part, share, cfg) for part in parts]
        lines, levels = [], levels + 1
        for part, reply in zip(parts, got, strict=True):
            if isinstance(reply, Failure):
                return [], [work.reject("story: no reply", reply.reason)]
            try:
                lines += _notes(reply.text, part)
            except ValueError as error:
                return [], [work.reject("story: bad reply", str(error))]
    return [{"story": story(lines), "lines": lines, "levels": levels}], []


def story(lines: Sequence[Item]) -> str:
    """Returns "[0:10 - 0:20] what happens", a line each."""
    return "\n".join(f"{clock.span(x['start_s'], x['end_s'])} {x['text']}" for x in lines)


def num_tokens(text: str) -> int:
    return math.ceil(len(text) / TOKEN_CHARACTERS)


def _parts(lines: Sequence[Item], most_tokens: float) -> list[list[Item]]:
    """Returns neighbouring lines together, as many as fit; a longer line stands alone."""
    parts: list[list[Item]] = [[]]
    for line in lines:
        if parts[-1] and num_tokens(story([*parts[-1], line])) > most_tokens:
            parts.append([])
        parts[-1].append(line)
    return parts


def _request(part: list[Item], share: float, cfg: GenerateConfig) -> Request:
    start, end = clock.bounds(part[0]["start_s"], part[-1]["end_s"])
    notes = story(part)
    asked = texts.fill(
        "condense",
        cfg.texts,
        start=start,
        end=end,
        words=max(5, int(share * num_tokens(notes) / WORD_TOKENS)),
        notes=notes,
    )
    return Request(
        messages=({"role": "user", "content": asked},),
        temperature=cfg.merge.temperature,
        max_tokens=cfg.merge.max_tokens,
        seed=cfg.seed,
        schema=NOTES_SCHEMA,
        enforce=False,
        name="notes",
    )


def _notes(text: str, part: list[Item]) -> list[Item]:
    """Reads a condensed part; every note must lie in the part, and they in order."""
    notes = replies.json_object(text).get("notes")
    if not isinstance(notes, list) or not notes:
        raise ValueError("notes must be a list that is not empty")
    first_s, last_s = part[0]["start_s"], part[-1]["end_s"]
    lines: list[Item] = []
    for note in notes:
        start_s, end_s = (clock.seconds(replies.text_of(note, name)) for name in ("start", "end"))
        if not first_s - SLACK_S <= start_s < end_s <= last_s + SLACK_S:
            told = f"{clock.told(start_s)} - {clock.told(end_s)}"
            raise ValueError(f"{told} is not inside {clock.span(first_s, last_s)}")
        if lines and start_s < lines[-1]["start_s"]:
            raise ValueError(f"a note of {clock.told(start_s)} follows a later one")
        start_s, end_s = max(start_s, first_s), min(end_s, last_s)
        lines.append({"start_s": start_s, "end_s": end_s, "text": replies.text_of(note, "text")})
    return lines
