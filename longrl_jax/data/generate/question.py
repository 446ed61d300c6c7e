"""Questions about a story: one request a kind and form, the reply guided by a JSON schema."""

from collections.abc import Generator
from typing import Any

from longrl_jax.chat import Failure, Request
from longrl_jax.data.generate import texts, work
from longrl_jax.data.generate.settings import KINDS, GenerateConfig
from longrl_jax.data.generate.work import Item

TEXTS = ("question_choice", "question_open", *KINDS)
LETTERS = "ABCD"
STEP_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("start", "end", "text")},
    "required": ["start", "end", "text"],
    "additionalProperties": False,
}


def steps(film: str, before: list[Item], cfg: GenerateConfig) -> Generator[Any, Any, Any]:
    """Returns (a reply a kind and form, as it came; rejects)."""
    items, rejects = [], []
    for merged in before:
        wishes = [(kind, form) for kind in cfg.question.kinds for form in cfg.question.forms]
        got = yield [_request(merged["story"], kind, form, cfg) for kind, form in wishes]
        for (kind, form), reply in zip(wishes, got, strict=True):
            if isinstance(reply, Failure):
                rejects.append(
                    work.reject("question: no reply", reply.reason, kind=kind, form=form)
                )
            else:
                items.append({"kind": kind, "form": form, "reply": reply.text})
    return items, rejects


def schema(form: str, count: int) -> dict[str, Any]:
    """Returns the JSON schema of `count` questions, or fewer."""
    text = {"type": "string"}
    fields: dict[str, Any] = {"question": text}
    if form == "choice":
        size = {"minItems": len(LETTERS), "maxItems": len(LETTERS)}
        fields |= {
            "options": {"type": "array", "items": text} | size,
            "answer": {"type": "string", "enum": list(LETTERS)},
        }
    else:
        fields["answer"] = text
    fields["reasoning"] = {"type": "array", "minItems": 1, "items": STEP_SCHEMA}
    one = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"questions": {"type": "array", "items": one, "maxItems": count}},
        "required": ["questions"],
        "additionalProperties": False,
    }


def _request(story: str, kind: str, form: str, cfg: GenerateConfig) -> Request:
    asked = texts.fill(
        f"question_{form}",
        cfg.texts,
        story=story,
        kind=kind,
        about=texts.fill(kind, cfg.texts),
        count=cfg.question.per_kind,
    )
    return Request(
        messages=({"role": "user", "content": asked},),
        temperature=cfg.question.temperature,
        max_tokens=cfg.question.max_tokens,
        seed=cfg.seed,
        schema=schema(form, cfg.question.per_kind),
        enforce=False,
        name=f"question_{kind}_{form}",
    )
