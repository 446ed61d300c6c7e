"""Asking language models behind OpenAI-compatible servers; nothing that was paid for is lost."""

from longrl_jax.chat.client import Request, ask, check
from longrl_jax.chat.journal import Failure, Reply, Totals, spent
from longrl_jax.chat.replies import json_of
from longrl_jax.config import ChatConfig

__all__ = [
    "ChatConfig",
    "Failure",
    "Reply",
    "Request",
    "Totals",
    "ask",
    "check",
    "json_of",
    "spent",
]
