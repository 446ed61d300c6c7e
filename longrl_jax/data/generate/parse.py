"""Replies with questions, read and checked one by one; asks nobody.

Kept is only what can be answered from the film: four options that differ, one answer, times that
lie in the film and in its story, no word that tells that nobody watched it. The right options of a
film's questions take the letters in turn, from a letter that the film's content chooses: "always B"
is right one time in four.
"""

import functools
import re
from collections.abc import Generator
from typing import Any

from longrl_jax.data.generate import clock, merge, replies, work
from longrl_jax.data.generate.question import LETTERS
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item

LETTER_BEFORE = re.compile(r"\s*(?:\(?([A-D])[.):]|\(([A-D])\))\s+")
"""How an option may begin: "B. ", "(B) ", "B) "."""
ANSWER_LETTER = re.compile(r"\s*(?:<answer>)?\s*\(?([A-D])(?:[.):]?\s*(?:</answer>)?\s*\Z|[.):]\s)")
OTHERS = re.compile(
    r"\b(?:all|none|both|neither|either|any) of (?:the )?(?:above|these|other)|"
    r"\b(?:both|neither) [A-D]\b|\boptions? [A-D]\b",
    re.IGNORECASE,
)
"""An option that speaks of others means something else once they are shuffled."""
NAMED_LETTER = re.compile(r"\b(?:option|answer|choice)s?(?: is| are|:)? \(?[A-D]\b", re.IGNORECASE)
LEAST_WORDS = 3
"""Of a question: small models fill a form with dots and numbers."""
MOST_WORDS = 400
"""Of a question with its options: more is a story."""
TAG = re.compile(r"</?(?:think|answer)>|<(?:image|video)>|<\|[^|<>]*\|>")


class Unusable(ValueError):
    """(reason, detail) of a question that is left out."""


def steps(
    film: str, before: list[Item], cfg: GenerateConfig, told: list[Item], about: list[Item]
) -> Generator[Any, Any, Any]:
    """Returns (questions, rejects). told and about: the items of merge and split."""
    yield from ()
    items, rejects, seen = [], [], set()
    for reply in before:
        kind, form = reply["kind"], reply["form"]
        try:
            drafts = _drafts(reply["reply"])
        except Unusable as error:
            rejects.append(work.reject(*error.args, kind=kind, form=form, reply=reply["reply"]))
            continue
        for draft in drafts[: cfg.question.per_kind]:
            try:
                question = read(draft, form, lines=told[0]["lines"])
                same = plain(question["question"])
                if (form, same) in seen:
                    raise Unusable("question: asked twice", question["question"])
            except Unusable as error:
                rejects.append(work.reject(*error.args, kind=kind, form=form, draft=draft))
                continue
            seen.add((form, same))
            name = work.digest([about[0]["sha256"], kind, form, same])[:12]
            items.append({"id": name, "kind": kind, "form": form} | question)
    return (with_letters(items, about[0]["sha256"]) if items else []), rejects


def read(draft: Any, form: str, *, lines: list[Item]) -> Item:
    """Returns {"question", "options", "answer", "steps"} of a draft; raises Unusable.

    lines: of the story. answer: of a question with options the index of the right one, else text.
    """
    try:
        asked = replies.text_of(draft, "question")
        options = _options(draft.get("options")) if form == "choice" else []
        answer: Any = replies.text_of(draft, "answer")
        if form == "choice":
            answer = _index(answer, options)
        looked = _looked(draft.get("reasoning"), lines)
    except Unusable:
        raise
    except ValueError as error:
        raise Unusable("question: bad form", str(error)) from None
    said = [asked, *options, *(step["text"] for step in looked)]
    said += [] if form == "choice" else [answer]
    for text in said:
        if replies.LEAK.search(text):
            raise Unusable("question: speaks of captions", text)
        if TAG.search(text):
            raise Unusable("question: holds a tag", text)
    if len(plain(asked).split()) < LEAST_WORDS or not plain(str(answer)):
        raise Unusable("question: no words", f"{asked} | {answer}")
    if len(" ".join([asked, *options]).split()) > MOST_WORDS:
        raise Unusable("question: too long", f"over {MOST_WORDS} words")
    if form == "choice" and any(NAMED_LETTER.search(step["text"]) for step in looked):
        raise Unusable("question: reasoning names a letter", looked[-1]["text"])
    if form == "open" and plain(answer) in plain(asked):
        raise Unusable("question: holds its answer", asked)
    return {"question": asked, "options": options, "answer": answer, "steps": looked}


def with_letters(items: list[Item], content: str) -> list[Item]:
    """Moves every right option to its letter; `answer` becomes the letter."""
    turn, done = int(content[:8], 16), []
    for item in items:
        if item["options"]:
            right = item["options"][item["answer"]]
            options = [option for option in item["options"] if option != right]
            options.sort(key=functools.partial(_place, item["id"]))
            options.insert(turn % len(LETTERS), right)
            item = item | {"options": options, "answer": LETTERS[turn % len(LETTERS)]}
            turn += 1
        done.append(item)
    return done


def problem(item: Item) -> str:
    """Returns the question as published records have it, options "A. ..." a line each."""
    options = [f"{x}. {text}" for x, text in zip(LETTERS, item["options"], strict=False)]
    return "\n".join([item["question"], *options])


def plain(text: str) -> str:
    """Returns letters and digits alone, in lower case, to compare texts."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _place(name: str, option: str) -> str:
    return work.digest([name, option])


def _drafts(reply: str) -> list[Any]:
    try:
        tree = replies.json_object(reply)
    except ValueError as error:
        raise Unusable("question: no JSON", str(error)) from None
    drafts = tree.get("questions")
    if not isinstance(drafts, list):
        raise Unusable("question: bad form", f"questions must be a list, got {drafts!r:.80}")
    if not drafts:
        raise Unusable("question: none written", "")
    return drafts


def _options(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) != len(LETTERS):
        raise Unusable("question: not four options", f"{value!r:.200}")
    options = [replies.text_of({"option": option}, "option") for option in value]
    begins = [LETTER_BEFORE.match(option) for option in options]
    if [x and (x[1] or x[2]) for x in begins] == list(LETTERS):  # "A. red", "B. blue", ...
        options = [o[match.end() :] for o, match in zip(options, begins, strict=True) if match]
    if len({plain(option) for option in options}) < len(LETTERS) or not all(options):
        raise Unusable("question: options alike", " | ".join(options))
    if any(OTHERS.search(option) for option in options):
        raise Unusable("question: option about options", " | ".join(options))
    return options


def _index(answer: str, options: list[str]) -> int:
    """Returns which option an answer names, by its letter or by its words."""
    match = ANSWER_LETTER.match(answer)
    by_words = [i for i, option in enumerate(options) if plain(option) == plain(answer)]
    if match:
        return LETTERS.index(match[1])
    if by_words:
        return by_words[0]
    raise Unusable("question: no one answer", f"{answer!r} is none of {' | '.join(options)}")


def _looked(value: Any, lines: list[Item]) -> list[Item]:
    """Reads the steps of a reasoning; each must look at a time that the story tells of."""
    if not isinstance(value, list) or not value:
        raise Unusable("question: no reasoning", f"{value!r:.80}")
    last_s = max(line["end_s"] for line in lines)
    looked = []
    for step in value:
        start_s, end_s = (clock.seconds(replies.text_of(step, name)) for name in ("start", "end"))
        told = f"{clock.told(start_s)} - {clock.told(end_s)}"
        if not 0 <= start_s < end_s <= last_s + merge.SLACK_S:
            raise Unusable("question: time outside the film", f"{told} of {clock.told(last_s)}")
        if not any(x["start_s"] < end_s and start_s < x["end_s"] for x in lines):
            raise Unusable("question: time outside the story", told)
        text = replies.text_of(step, "text")
        looked.append({"start_s": start_s, "end_s": min(end_s, last_s), "text": text})
    return looked
