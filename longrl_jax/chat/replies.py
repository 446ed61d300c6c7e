"""What a server's replies say, and whether one will do; nothing in them is believed."""

import dataclasses
import email.utils
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import openai

from longrl_jax.chat.journal import Reply

FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL)
Check = Callable[[str], ValueError | None]
"""Returns (or raises) what is wrong with a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A body that came with status 200: a reply, or what is wrong with it."""

    text: str
    finish_reason: str
    fault: str
    """Empty: none."""
    tokens: tuple[int, int] | None
    """Of prompt and completion, where the server says them."""
    broken: bool = False
    """Whether it is no reply of a model: no JSON, or none with a message."""


def read(body: str) -> Answer:
    """Takes a server's body apart."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        fault = f"the body is no JSON ({error})"
        return Answer(text=body[:2000], finish_reason="", fault=fault, tokens=None, broken=True)
    tree = tree if isinstance(tree, dict) else {}
    usage = tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    tokens = None
    if type(prompt) is int and type(completion) is int and min(prompt, completion) >= 0:
        tokens = prompt, completion
    choices = tree.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        fault = "the reply has no choices" if not choices else "its first choice has no message"
        return Answer(text=body[:2000], finish_reason="", fault=fault, tokens=tokens, broken=True)
    text, reason = choice["message"].get("content"), str(choice.get("finish_reason") or "")
    fault = ""
    if reason == "content_filter":
        fault = "the server's content filter cut the reply off"
    elif choice["message"].get("refusal"):
        fault = f"the model refuses: {choice['message']['refusal']}"
    elif not isinstance(text, str):
        fault = "its message has no text"
        if reason == "length":
            fault += ": max_tokens ended before the reasoning did; raise it"
    text = text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""  # surrogates
    return Answer(text=text, finish_reason=reason, fault=fault, tokens=tokens)


def reply_of(answer: Answer, *, seconds: float, tries: int) -> Reply:
    prompt_tokens, completion_tokens = answer.tokens or (0, 0)
    return Reply(
        text=answer.text,
        finish_reason=answer.finish_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=seconds,
        tries=tries,
    )


def fault_of(
    reply: Reply, *, schema: dict[str, Any] | None, max_tokens: int, check: Check | None
) -> str:
    """Says why a reply will not do; empty: it will. schema: that it must have."""
    cut = ""
    if reply.finish_reason == "length":
        cut = f"; it was cut off at max_tokens={max_tokens}"
    if schema is not None:
        try:
            jsonschema.validate(json_of(reply.text), schema)
        except jsonschema.ValidationError as error:
            return f"the reply breaks the schema: {error.message}{cut}"
        except (ValueError, RecursionError) as error:
            return f"the reply is no JSON ({error}){cut}"
    if check is not None:
        try:
            wrong = check(reply.text)
        except ValueError as error:
            wrong = error
        if wrong is not None:
            return f"{wrong or 'the check refuses it'}{cut}"
    return ""


def json_of(text: str) -> Any:
    """Returns what a JSON text says; it may stand in a ```json block, as unguided models write.

    Raises ValueError.
    """
    fenced = FENCED.fullmatch(text)
    return json.loads(fenced[1] if fenced else text)


def message(error: openai.APIStatusError) -> str:
    """Returns what the server says, without what the package adds."""
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    said = inner.get("message") if isinstance(inner, dict) else inner
    return " ".join(str(said or error.message).split())


def pause_s(error: openai.APIStatusError) -> float:
    """Returns the seconds of Retry-After, which may also be a date; 0 where it says none."""
    said = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
