"""What requests can cost at most, before they are sent.

Counted is what was replied. What a server bills for a reply that never came (a time-out, a cut
connection) is not known here, and may take its bill over the budget.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrl_jax import chat
from longrl_jax.chat import ChatConfig, Failure, Reply, Request
from longrl_jax.chat.client import digest
from longrl_jax.chat.journal import records

BYTE_TOKENS = 1.0
"""Prompt tokens of a byte of text at most (English has a quarter): no tokenizer splits a byte."""


def most_usd(request: Request, server: ChatConfig, *, frame_tokens: int) -> float:
    """Returns what one reply to a request costs at most."""
    usd = most_prompt(request, frame_tokens) * server.usd_per_million_prompt_tokens
    return (usd + request.max_tokens * server.usd_per_million_completion_tokens) / 1e6


def most_prompt(request: Request, frame_tokens: int) -> int:
    """Returns the tokens of a prompt at most, the schema of the reply counted."""
    schema = json.dumps(request.schema) if request.schema else ""
    parts = [message["content"] for message in request.messages]
    return math.ceil(sum(_tokens(part, frame_tokens) for part in [*parts, schema]))


class Budget:
    """Owner of what may still be spent, in USD."""

    def __init__(self, left_usd: float):
        self.left_usd = left_usd

    def ask(
        self,
        requests: Sequence[Request],
        server: ChatConfig,
        *,
        frame_tokens: int,
        journal: Path,
        check: Callable[[str], ValueError | None] | None,
        name: str,
    ) -> list[Reply | Failure]:
        """As chat.ask, as many requests at once as surely fit. name: of the stage.

        Raises ValueError where the next request could take the cost over the budget.
        """
        if not (server.usd_per_million_prompt_tokens or server.usd_per_million_completion_tokens):
            return chat.ask(requests, server, journal=journal, check=check, progress=name)
        requests = [
            dataclasses.replace(x, most_prompt_tokens=most_prompt(x, frame_tokens))
            for x in requests
        ]
        got: list[Reply | Failure] = []
        while len(got) < len(requests):
            rest = requests[len(got) :]
            count = self._fitting(rest, server, frame_tokens, journal)
            if not count:
                raise ValueError(
                    f"{name}: {self.left_usd:.4f} USD are left of max_usd, which the next request "
                    "could pass; raise max_usd and run the same command again: nothing that was "
                    "paid for is lost"
                )
            before_usd = chat.spent(journal).usd
            got += chat.ask(rest[:count], server, journal=journal, check=check, progress=name)
            self.left_usd -= chat.spent(journal).usd - before_usd
        return got

    def _fitting(
        self, requests: Sequence[Request], server: ChatConfig, frame_tokens: int, journal: Path
    ) -> int:
        """Returns how many of the first requests cost no more than what is left, whatever happens:
        each that the journal lacks may be paid for server.max_tries times."""
        lines = records(journal) if journal.exists() else ()
        held = {line["key"] for line in lines if line["kind"] == "reply"}
        left_usd = self.left_usd
        for count, request in enumerate(requests):
            if digest(request, server.model) in held:
                continue
            left_usd -= server.max_tries * most_usd(request, server, frame_tokens=frame_tokens)
            if left_usd < 0:
                return count
        return len(requests)


def _tokens(content: Any, frame_tokens: int) -> float:
    if isinstance(content, str):
        return len(content.encode()) * BYTE_TOKENS + 10  # of the chat template
    return sum(
        _tokens(part["text"], 0) if part["type"] == "text" else frame_tokens for part in content
    )
