"""What a generation costs if every request is asked once, from the films alone; asks nobody."""

import math
from collections.abc import Sequence
from typing import Any

from longrl_jax.data.generate import merge, run, texts
from longrl_jax.data.generate.settings import GenerateConfig

SHORT_TOKENS = 400
"""Of a question with its answer, steps or reasoning, at most."""


def bill(cfg: GenerateConfig, films: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row a stage: requests, prompt_tokens, reply_tokens, usd, of all films whose split
    is done; what the journals hold is not taken off.

    Stories and replies are as long as they may be, every request is asked once and a story is
    condensed once. Tries after the first (up to max_tries) and more levels of `merge` (up to
    merge.MOST_LEVELS) cost more than this.
    """
    rows: dict[str, dict[str, Any]] = {
        name: {"requests": 0, "prompt_tokens": 0, "reply_tokens": 0}
        for name in ("caption", "merge", "question", "rewrite", "verify")
    }
    for film in films:
        made = run.work_of(cfg, "split", film)
        if made is not None and made.items:
            _add_film(cfg, rows, len(made.items[0]["clips"]))
    for name, row in rows.items():
        section = getattr(cfg, name)
        row["usd"] = 0.0
        if section.server:
            server = cfg.servers[section.server]
            row["usd"] = row["prompt_tokens"] * server.usd_per_million_prompt_tokens / 1e6
            row["usd"] += row["reply_tokens"] * server.usd_per_million_completion_tokens / 1e6
    return [{"stage": name} | row for name, row in rows.items()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the bill for people."""
    lines = [
        f"{'stage':10} {'requests':>10} {'prompt tokens':>16} {'reply tokens':>14} {'USD':>12}"
    ]
    names = ("requests", "prompt_tokens", "reply_tokens", "usd")
    total = {"stage": "all"} | {name: sum(row[name] for row in rows) for name in names}
    for row in [*rows, total]:
        lines.append(
            f"{row['stage']:10} {row['requests']:10,} {row['prompt_tokens']:16,} "
            f"{row['reply_tokens']:14,} {row['usd']:12.4f}"
        )
    lines.append(
        "every request once, with replies as long as they may be; tries after the first, and "
        "stories that are condensed more than once, come on top (max_usd bounds those, too)"
    )
    return "\n".join(lines)


def _add_film(cfg: GenerateConfig, rows: dict[str, dict[str, Any]], num_clips: int) -> None:
    def add(name: str, number: int, prompt: float, reply: float) -> None:
        row = rows[name]
        row["requests"] += number
        row["prompt_tokens"] += math.ceil(number * prompt)
        row["reply_tokens"] += math.ceil(number * reply)

    longest = num_clips * (cfg.caption.max_tokens + 10)
    told = min(longest, cfg.merge.story_tokens)
    asked = _tokens(cfg, "caption") + cfg.caption.frames * (cfg.caption.frame_tokens + 4)
    add("caption", num_clips, asked, cfg.caption.max_tokens)
    if longest > told and cfg.merge.server:
        parts = math.ceil(longest / cfg.merge.max_tokens)
        add("merge", parts, cfg.merge.max_tokens + _tokens(cfg, "condense"), cfg.merge.max_tokens)
    count = len(cfg.question.kinds) * len(cfg.question.forms)
    longest_kind = max(_tokens(cfg, kind) for kind in cfg.question.kinds)
    asked = told + max(_tokens(cfg, f"question_{form}") for form in cfg.question.forms)
    add("question", count, asked + longest_kind, cfg.question.max_tokens)
    count *= cfg.question.per_kind
    add("rewrite", count, _tokens(cfg, "rewrite") + SHORT_TOKENS, cfg.rewrite.max_tokens)
    add("verify", count, told + _tokens(cfg, "answer_open") + SHORT_TOKENS, cfg.verify.max_tokens)
    blind = count * cfg.verify.blind_tries
    add("verify", blind, _tokens(cfg, "blind_open") + SHORT_TOKENS, cfg.verify.max_tokens)
    if "open" in cfg.question.forms:  # judged: an answer, and the blind ones
        judged = (count + blind) // len(cfg.question.forms)
        add("verify", judged, _tokens(cfg, "same") + SHORT_TOKENS, cfg.verify.max_tokens)


def _tokens(cfg: GenerateConfig, name: str) -> int:
    return merge.num_tokens(texts.read(name, cfg.texts))
