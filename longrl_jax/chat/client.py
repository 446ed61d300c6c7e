"""The client of any OpenAI-compatible server: many requests at once, tried again, kept.

A reply is in the journal, on disk, before `ask` counts it, under the SHA-256 of the model and of
all that the reply depends on; the same request is then sent again by no run. Only what is in flight
when a process is killed may be paid twice (and, on servers that count them, replies that a time-out
or a broken connection kept from coming: nobody here can know).
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import random
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
from aiolimiter import AsyncLimiter
from tqdm import tqdm

from longrl_jax.chat import replies
from longrl_jax.chat.journal import Failure, Journal, Reply
from longrl_jax.config import ChatConfig

FIRST_WAIT_S = 0.5
"""Before the second try; twice as long before every other one, at most MAX_WAIT_S."""
MAX_WAIT_S = 60.0
MAX_PAUSE_S = 600.0
"""The longest pause (Retry-After) that is waited for; one that a server wants longer ends `ask`."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
"""Statuses that may be others at the next try."""
CLOSED = (401, 403, 404, 405)
"""Statuses that every other request would get, too."""
LEAST_KEY = 12
"""Letters of a key that is taken out of replies."""
MAX_UNREACHED = 32
"""Requests in a row that may fail without a word from the server; then `ask` ends."""
MAX_REFUSED = 3
"""Requests that a server may refuse (400, 413, 422) before it has answered any; then `ask` ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request; two that are equal but for their names are the same one, and asked once."""

    messages: tuple[dict[str, Any], ...]
    """As the API takes them: {"role": ..., "content": ...}."""
    temperature: float = 0.0
    max_tokens: int
    """Longest reply."""
    seed: int | None = None
    """For servers that take one; several replies to one question differ in it."""
    schema: dict[str, Any] | None = None
    """JSON schema that the reply must have: the server is asked to guide it (response_format), and
    a reply that breaks it is asked again."""
    enforce: bool = True
    """False: the server is asked for the schema, but `check` alone says which reply will do."""
    name: str = ""
    """For people who read the journal; no part of what is asked."""
    most_prompt_tokens: int = 0
    """Where a server does not say what a reply took, its price is that of so many, and max_tokens;
    0: nothing. No part of what is asked."""

    def __post_init__(self):
        if not self.messages:
            raise ValueError(f"request {self.name!r} has no messages")
        if not 0 <= self.temperature <= 10 or self.max_tokens < 1:
            raise ValueError(
                f"request {self.name!r}: temperature={self.temperature} must be 0 to 10 and "
                f"max_tokens={self.max_tokens} at least 1"
            )


def ask(
    requests: Sequence[Request],
    cfg: ChatConfig,
    *,
    journal: Path | None,
    check: replies.Check | None = None,
    progress: str = "",
) -> list[Reply | Failure]:
    """Returns a reply to every request, in order, or why there is none.

    journal: file of replies, made where it is not there; what it holds is not asked again. None:
    nothing is kept. check: returns (or raises) a ValueError for a reply that will not do: it is
    paid for, and asked again up to cfg.max_tries, with another seed. It also judges what the
    journal holds. progress: title of the bar; empty: none.

    Raises ValueError that says the way out where the server cannot be asked or takes no such
    request (no key, 401, 404, ...), or another process has the journal; OSError where the server
    is not reached for many requests in a row, or the journal cannot be written. What came before
    is kept.
    """
    secret = _key(cfg)
    keys = [digest(request, cfg.model) for request in requests]
    asked = dict(zip(keys, requests, strict=True))
    with contextlib.ExitStack() as stack:
        book = None if journal is None else stack.enter_context(Journal(journal))
        held = {} if book is None else book.replies(asked.keys())
        found: dict[str, Reply | Failure] = {
            key: reply for key, reply in held.items() if not _fault(reply, asked[key], check)
        }
        waiting = {key: request for key, request in asked.items() if key not in found}
        if waiting:
            bar = stack.enter_context(
                tqdm(
                    total=len(asked),
                    initial=len(found),
                    desc=progress,
                    unit="request",
                    leave=False,
                    dynamic_ncols=True,
                    disable=not progress,
                )
            )
            asker = _Asker(cfg, secret, book, check, bar, num_cached=len(found))
            asyncio.run(asker.run(waiting))
            found |= asker.found
    return [found[key] for key in keys]


def digest(request: Request, model: str) -> str:
    """Returns the key of a request in the journal: SHA-256 of all that its reply depends on."""
    about = dataclasses.asdict(request)
    del about["name"], about["enforce"], about["most_prompt_tokens"]
    text = json.dumps(about | {"model": model}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Refused(ValueError):
    """The server takes no such request; closed: nor any other."""

    def __init__(self, message: str, *, closed: bool):
        super().__init__(message)
        self.closed = closed


class _Passing(Exception):
    """A try that failed, and the seconds that the server wants to be left alone."""

    def __init__(self, reason: str, *, pause_s: float = 0.0, reached: bool = True):
        super().__init__(reason)
        self.pause_s, self.reached = pause_s, reached


class _Asker:
    """Owner of the connections to a server while its requests are asked."""

    def __init__(
        self,
        cfg: ChatConfig,
        secret: str,
        book: Journal | None,
        check: replies.Check | None,
        bar: tqdm,
        *,
        num_cached: int,
    ):
        self.found: dict[str, Reply | Failure] = {}
        self._cfg, self._secret, self._book, self._check = cfg, secret, book, check
        self._bar, self._num_cached = bar, num_cached
        self._error: Exception | None = None
        self._open_at_s = 0.0
        self._num_waiting = 0
        self._num_answered = num_cached
        self._num_refused = self._num_unreached = 0
        self._shown = {"sent": 0, "failed": 0, "tokens": 0, "usd": 0.0}

    async def run(self, waiting: dict[str, Request]) -> None:
        """Asks all. Where one ends it, those in flight are waited for, and kept, before."""
        self._num_waiting = len(waiting)
        rate = self._cfg.requests_per_minute
        self._limiter = AsyncLimiter(1, 60 / rate) if rate else None  # no bursts
        todo = iter(waiting.items())
        async with self._client() as self._server:
            workers = min(self._cfg.concurrency, len(waiting))
            await asyncio.gather(*(self._work(todo) for _ in range(workers)))
        if self._error is not None:
            raise self._error

    def _client(self) -> openai.AsyncOpenAI:
        local = is_loopback(self._cfg.base_url)  # a proxy would not find it
        return openai.AsyncOpenAI(
            base_url=self._cfg.base_url,
            api_key=self._secret or "none",
            max_retries=0,  # we count them, and every paid try is journaled
            timeout=None,  # of the whole try, in _try; theirs starts anew with every byte
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if local else None,
        )

    async def _work(self, todo: Iterator[tuple[str, Request]]) -> None:
        for key, request in todo:
            if self._error is not None:
                return
            try:
                await self._one(key, request)
            except (ValueError, OSError) as error:
                self._error = self._error or error
                return

    async def _one(self, key: str, request: Request) -> None:
        """Leaves the reply to a request, or its failure, in found and in the journal."""
        about = {"key": key, "name": request.name, "model": self._cfg.model}
        reason, reached, passing, num_useless, tries = "", False, False, 0, 0
        while tries < self._cfg.max_tries and self._error is None:
            await self._wait()
            if self._error is not None:
                return
            tries += 1
            self._show(sent=1)
            started_s = time.perf_counter()
            try:
                answer = await self._try(request, num_useless)
            except _Passing as trouble:
                reason, reached, passing = str(trouble), reached or trouble.reached, True
                self._pause(trouble.pause_s)
                if tries < self._cfg.max_tries:
                    wait_s = min(FIRST_WAIT_S * 2 ** (tries - 1), MAX_WAIT_S)
                    await asyncio.sleep(random.uniform(wait_s / 2, wait_s))
                continue
            except _Refused as refusal:
                if self._ends_all(refusal):
                    raise
                reason, reached, passing = str(refusal), True, False
                break
            reached, passing = True, answer.broken
            seconds = round(time.perf_counter() - started_s, 3)
            reply = replies.reply_of(answer, seconds=seconds, tries=tries)
            text, ending = map(self._without_key, (reply.text, reply.finish_reason))
            reply = dataclasses.replace(reply, text=text, finish_reason=ending)
            reason = self._scrubbed(answer.fault or _fault(reply, request, self._check))
            self._num_answered += not answer.fault
            self._keep_paid(about, reply, reason, request, metered=answer.tokens is not None)
            if not reason:
                self._num_unreached = 0
                self.found[key] = reply
                self._bar.update()
                return
            num_useless += 1
            if reply.finish_reason == "content_filter":  # it would filter that again
                break
        if self._error is not None:
            return
        self._keep(about | {"kind": "failure", "reason": reason, "tries": tries})
        self.found[key] = Failure(reason=reason, tries=tries, reached=reached, passing=passing)
        self._show(failed=1)
        self._bar.update()
        self._num_unreached = 0 if reached else self._num_unreached + 1
        if self._num_unreached == MAX_UNREACHED:
            raise ConnectionError(
                f"the server {self._cfg.base_url} was not reached for {MAX_UNREACHED} requests in "
                f"a row ({reason}); start it, or check base_url, and give the same command again: "
                "nothing that was answered is lost"
            )

    async def _try(self, request: Request, num_useless: int) -> replies.Answer:
        """Sends a request once. num_useless: replies to it that would not do, so far."""
        cfg = self._cfg
        more: dict[str, Any] = {}
        if request.seed is not None:
            more["seed"] = _seed(request.seed, num_useless)
        if request.schema is not None:
            form = {"name": "reply", "schema": request.schema, "strict": True}
            more["response_format"] = {"type": "json_schema", "json_schema": form}
        try:
            async with asyncio.timeout(cfg.timeout_s):
                raw = await self._server.chat.completions.with_raw_response.create(
                    model=cfg.model,
                    messages=_sendable(request.messages),
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    **more,
                )
        except (TimeoutError, openai.APITimeoutError):
            reason = f"no reply within timeout_s={cfg.timeout_s:g}"
            raise _Passing(reason, reached=False) from None
        except openai.APIConnectionError as error:
            reason = self._scrubbed(f"{cfg.base_url}: {error.__cause__ or error!r}")
            raise _Passing(reason, reached=False) from None
        except openai.APIStatusError as error:
            raise self._trouble(error) from None
        return replies.read(raw.http_response.text)

    def _trouble(self, error: openai.APIStatusError) -> Exception:
        """Says what a status other than 200 means."""
        cfg, status = self._cfg, error.status_code
        said = self._scrubbed(f"{status}: {replies.message(error)}")
        broke = error.code == "insufficient_quota"
        pause_s = replies.pause_s(error)
        if status in PASSING and not broke and pause_s <= MAX_PAUSE_S:
            return _Passing(said, pause_s=pause_s)
        name = cfg.api_key_env or "no environment variable (api_key_env is empty)"
        if status in (401, 403):
            way_out = f"its key is read from {name}: set that to one which may use this model"
        elif status in (404, 405):
            way_out = "check base_url (most end in /v1) and model; GET BASE_URL/models names them"
        elif broke:
            way_out = f"the account of the key in {name} has nothing left; fill it up"
        elif status in PASSING:
            way_out = f"it wants {pause_s:.0f} s without requests; give the same command then"
        else:
            way_out = "mend what it says: max_tokens, a prompt that is too long, schema, model"
        return _Refused(
            f"the server {cfg.base_url} refuses model={cfg.model!r} ({said}); {way_out}. Nothing "
            "that was answered is lost",
            closed=status in CLOSED or status in PASSING,
        )

    def _ends_all(self, refusal: _Refused) -> bool:
        self._num_refused += 1
        all_refused = self._num_refused >= min(MAX_REFUSED, self._num_waiting)
        return refusal.closed or (all_refused and not self._num_answered)

    async def _wait(self) -> None:
        """Until the server wants to be asked, and the limit allows it."""
        while self._error is None and (wait_s := self._open_at_s - time.monotonic()) > 0:
            await asyncio.sleep(min(wait_s, 1.0))
        if self._limiter is not None:
            await self._limiter.acquire()

    def _pause(self, pause_s: float) -> None:
        self._open_at_s = max(self._open_at_s, time.monotonic() + pause_s)

    def _keep_paid(
        self,
        about: dict[str, Any],
        reply: Reply,
        reason: str,
        request: Request,
        *,
        metered: bool,
    ) -> None:
        """reason: why it will not do; empty: it will."""
        cfg, tokens = self._cfg, (reply.prompt_tokens, reply.completion_tokens)
        if not metered and request.most_prompt_tokens:
            tokens = request.most_prompt_tokens, request.max_tokens
        usd = cfg.usd_per_million_prompt_tokens * tokens[0]
        usd += cfg.usd_per_million_completion_tokens * tokens[1]
        usd /= 1e6
        self._show(tokens=reply.prompt_tokens + reply.completion_tokens, usd=usd)
        verdict = {"kind": "refused", "reason": reason} if reason else {"kind": "reply"}
        paid = dataclasses.asdict(reply) | {"usd": usd, "metered": metered}
        self._keep(about | verdict | paid)

    def _keep(self, record: dict[str, Any]) -> None:
        if self._book is not None:
            self._book.append(record)

    def _scrubbed(self, text: str) -> str:
        text = self._hidden(text)
        return text if len(text) <= 500 else f"{text[:500]} ..."

    def _without_key(self, text: str) -> str:
        """Returns a reply without the key; words such as EMPTY, that local servers are given as
        one, are left in it."""
        return self._hidden(text) if len(self._secret) >= LEAST_KEY else text

    def _hidden(self, text: str) -> str:
        """Returns a text without the key, which a server may have echoed."""
        return text.replace(self._secret, "[key]") if self._secret else text

    def _show(self, **more: float) -> None:
        for name, value in more.items():
            self._shown[name] += value
        shown = self._shown
        self._bar.set_postfix_str(
            f"{self._num_cached} cached, {shown['sent']} sent, {shown['failed']} failed, "
            f"{shown['tokens']:,} tokens, {shown['usd']:.4f} USD",
            refresh=False,
        )


def is_loopback(base_url: str) -> bool:
    """Whether a server is of this machine."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check(cfg: ChatConfig) -> None:
    """Raises ValueError that says the way out where no server, model or key is named."""
    _key(cfg)


def _key(cfg: ChatConfig) -> str:
    """Returns the key of the server; it is in no message, journal or log."""
    if not cfg.base_url or not cfg.model:
        raise ValueError(
            f"base_url={cfg.base_url!r} and model={cfg.model!r} must both be named: an "
            "OpenAI-compatible server, e.g. http://localhost:8000/v1, and one of its models"
        )
    secret = os.environ.get(cfg.api_key_env, "").strip() if cfg.api_key_env else ""
    if cfg.api_key_env and not secret and not is_loopback(cfg.base_url):
        raise ValueError(
            f"the server {cfg.base_url} wants a key: set the environment variable "
            f"{cfg.api_key_env} (api_key_env) to it; for a server without keys leave api_key_env "
            "empty"
        )
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError(f"the environment variable {cfg.api_key_env} holds no key: odd letters")
    return secret


def _sendable(messages: Sequence[dict[str, Any]]) -> Any:
    """Returns the messages with "?" for halves of surrogate pairs, which UTF-8 has no bytes for."""
    text = json.dumps(messages, ensure_ascii=False, allow_nan=False)
    return json.loads(text.encode("utf-8", "replace"))


def _fault(reply: Reply, request: Request, check: replies.Check | None) -> str:
    schema = request.schema if request.enforce else None
    return replies.fault_of(reply, schema=schema, max_tokens=request.max_tokens, check=check)


def _seed(seed: int, num_useless: int) -> int:
    """Returns another seed after a reply that would not do; 0 to 2**31 - 1."""
    if not num_useless:
        return seed
    text = f"{seed} {num_useless}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1
