"""A second model answers each question: with the story it must be right, without it not always.

An open answer in other words than the reference is judged by the same server.
"""

from collections.abc import Generator, Sequence
from typing import Any

from longrl_jax.chat import Failure, Request
from longrl_jax.data.generate import replies, texts, work
from longrl_jax.data.generate.parse import ANSWER_LETTER, plain, problem
from longrl_jax.data.generate.question import LETTERS
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item

TEXTS = ("answer_choice", "answer_open", "blind_choice", "blind_open", "same")


def steps(
    film: str, before: list[Item], cfg: GenerateConfig, told: list[Item]
) -> Generator[Any, Any, Any]:
    """Returns (questions with `seen` and `blind`: the answers given, rejects). told: of merge."""
    if not before:
        return [], []
    story, rejects = told[0]["story"], []
    seen = yield from _right(before, [[_answer(x, story, cfg, seed=0)] for x in before], cfg)
    kept = []
    for item, (answers, right, failed) in zip(before, seen, strict=True):
        item = item | {"seen": answers}
        if failed:
            rejects.append(work.reject("verify: no reply", failed, question=item))
        elif not all(right):
            rejects.append(work.reject("verify: wrong with the story", answers[0], question=item))
        else:
            kept.append(item)
    tries = cfg.verify.blind_tries
    if not kept or not tries:
        return kept, rejects
    asked = [[_answer(x, "", cfg, seed=1 + k) for k in range(tries)] for x in kept]
    blind = yield from _right(kept, asked, cfg, blind=True)
    items = []
    for item, (answers, right, failed) in zip(kept, blind, strict=True):
        item = item | {"blind": answers}
        if failed:
            rejects.append(work.reject("verify: no reply", failed, question=item))
        elif all(right):
            rejects.append(work.reject("verify: right without the story", question=item))
        else:
            items.append(item)
    return items, rejects


def _right(
    items: Sequence[Item],
    requests: list[list[Request]],
    cfg: GenerateConfig,
    *,
    blind: bool = False,
) -> Generator[Any, Any, list[tuple[list[str], list[bool], str]]]:
    """Asks several answers to each question; returns (answers, which are right, why it failed).

    blind: one that names no option ("cannot know", null, prose) is an answer, and not right.
    """
    got = iter((yield [request for group in requests for request in group]))
    found: list[tuple[list[str], list[bool], str]] = []
    unsure: list[tuple[int, int]] = []
    for index, (item, group) in enumerate(zip(items, requests, strict=True)):
        answers, failed = [], ""
        for reply in [next(got) for _ in group]:
            try:
                answers.append(_read(reply, item, blind=blind))
            except ValueError as error:
                failed = str(error)
        right = [plain(answer) == plain(item["answer"]) for answer in answers]
        found.append((answers, right, failed))
        if not failed and not item["options"]:
            unsure += [(index, k) for k, same in enumerate(right) if answers[k] and not same]
    if unsure:
        judged = yield [_same(items[i], found[i][0][k], cfg) for i, k in unsure]
        for (i, k), reply in zip(unsure, judged, strict=True):
            try:
                found[i][1][k] = _verdict(reply)
            except ValueError as error:
                found[i] = (found[i][0], found[i][1], str(error))
    return found


def _read(reply: Any, item: Item, *, blind: bool) -> str:
    if isinstance(reply, Failure):
        if blind and reply.reason.startswith(replies.NO_JSON):
            return ""  # it said in prose that it cannot know
        raise ValueError(reply.reason)
    tree = replies.json_object(reply.text)
    if blind and not tree.get("answer"):
        return ""
    answer = replies.text_of(tree, "answer")
    if not item["options"]:
        return answer
    match = ANSWER_LETTER.match(answer)
    if not match and not blind:
        raise ValueError(f"{answer!r:.80} is no letter")
    return match[1] if match else answer


def _verdict(reply: Any) -> bool:
    if isinstance(reply, Failure):
        raise ValueError(reply.reason)
    same = replies.json_object(reply.text).get("same")
    if not isinstance(same, bool):
        raise ValueError(f"same must be true or false, got {same!r:.80}")
    return same


def _answer(item: Item, story: str, cfg: GenerateConfig, *, seed: int) -> Request:
    """story: empty for a blind answer."""
    form = "choice" if item["options"] else "open"
    if story:
        asked = texts.fill(f"answer_{form}", cfg.texts, story=story, question=problem(item))
    else:
        asked = texts.fill(f"blind_{form}", cfg.texts, question=problem(item))
    kind: dict[str, Any] = {"type": "string"}
    kind |= {"enum": list(LETTERS)} if form == "choice" else {}
    return _request(
        asked, "answer", kind, 0.0 if story else cfg.verify.blind_temperature, seed, cfg
    )


def _same(item: Item, answer: str, cfg: GenerateConfig) -> Request:
    asked = texts.fill(
        "same",
        cfg.texts,
        question=item["question"],
        reference=item["answer"],
        candidate=answer,
    )
    return _request(asked, "same", {"type": "boolean"}, 0.0, 0, cfg)


def _request(
    asked: str, field: str, kind: dict[str, Any], temperature: float, seed: int, cfg: GenerateConfig
) -> Request:
    return Request(
        messages=({"role": "user", "content": asked},),
        temperature=temperature,
        max_tokens=cfg.verify.max_tokens,
        seed=cfg.seed + seed,
        schema={
            "type": "object",
            "properties": {field: kind},
            "required": [field],
            "additionalProperties": False,
        },
        enforce=False,
        name=field,
    )
