"""The steps of a reasoning as one text, in the order of one who watches."""

import re
from collections.abc import Generator
from typing import Any

from longrl_jax.chat import Failure, Request
from longrl_jax.data.generate import clock, replies, texts, work
from longrl_jax.data.generate.parse import TAG, problem
from longrl_jax.data.generate.question import LETTERS
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item

TEXTS = ("rewrite",)
NAMED = re.compile(r"\b(?:option|answer|choice)(?: is|:)? \(?([A-D])\b")
CLOCK = re.compile(r"\b\d{1,2}:[0-5]\d\b")


def steps(film: str, before: list[Item], cfg: GenerateConfig) -> Generator[Any, Any, Any]:
    """Returns (questions with `reasoning`, rejects)."""
    items, rejects = [], []
    got = (yield [_request(item, cfg) for item in before]) if before else []
    for item, reply in zip(before, got, strict=True):
        if isinstance(reply, Failure):
            rejects.append(work.reject("rewrite: no reply", reply.reason, question=item))
            continue
        said = replies.words(reply.text)
        why = fault(said, item, cut=reply.finish_reason == "length")
        if why:
            rejects.append(work.reject(f"rewrite: {why}", said, question=item))
        else:
            items.append(item | {"reasoning": said})
    return items, rejects


def fault(said: str, item: Item, *, cut: bool) -> str:
    """Returns why a reasoning cannot be used, in a few fixed words, or ""."""
    if cut:
        return "cut off"
    if TAG.search(said):
        return "holds a tag"
    if replies.LEAK.search(said):
        return "speaks of captions"
    if CLOCK.search(said):
        return "tells clock times"
    if item["options"] and any(letter != item["answer"] for letter in NAMED.findall(said)):
        return "names another letter"
    return ""


def _request(item: Item, cfg: GenerateConfig) -> Request:
    answer = item["options"][LETTERS.index(item["answer"])] if item["options"] else item["answer"]
    looked = [f"{clock.span(x['start_s'], x['end_s'])} {x['text']}" for x in item["steps"]]
    asked = texts.fill(
        "rewrite", cfg.texts, question=problem(item), answer=answer, steps="\n".join(looked)
    )
    return Request(
        messages=({"role": "user", "content": asked},),
        temperature=cfg.rewrite.temperature,
        max_tokens=cfg.rewrite.max_tokens,
        seed=cfg.seed,
        name="rewrite",
    )
