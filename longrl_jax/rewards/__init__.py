"""Rewards: what an answer is worth; all samples of a step are judged at once, part by part.

A reward is called as reward(items) and returns for every item its parts by name, `total` among
them, or None where it could not judge: such a sample leaves the statistics of its group.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from longrl_jax.config import pick
from longrl_jax.rewards import (
    free_text,
    judge,
    math_answer,
    numeric,
    overlong,
    own,
    time_span,
    video_qa,
)
from longrl_jax.types import Scored

Parts = Mapping[str, float]
Reward = Callable[[Sequence[Scored]], Sequence[Parts | None]]
Judged = Mapping[str, Sequence[Parts | None]]
"""By the name of the reward."""

REWARDS: dict[str, Reward] = {
    "video_qa": video_qa.reward,
    "video_accuracy": video_qa.accuracy,
    "math_answer": math_answer.reward,
    "numeric": numeric.reward,
    "time_span": time_span.reward,
    "free_text": free_text.reward,
    "judge": judge.reward,
    "overlong": overlong.reward,
}


def named(name: str, server: judge.Server | None = None) -> Reward:
    """Returns the reward of a name: in REWARDS, or a person's own module:function.

    server: of the reward `judge`. Raises ValueError for a name that says neither.
    """
    if own.MARK in name:
        own.load(name)
        return functools.partial(own.judge, name)
    reward = pick(REWARDS, name, "rewards")
    return functools.partial(judge.reward, server=server) if reward is judge.reward else reward


def score(
    items: Sequence[Scored], weights: Mapping[str, float], server: judge.Server | None = None
) -> list[Parts | None]:
    """Returns for every item `total`, the weighted sum of the rewards, and "<reward>/<part>".

    weights: by the names that `named` takes. None where one of the rewards could not judge the
    item.
    """
    return joined(judged(items, weights, server), weights)


def judged(
    items: Sequence[Scored], weights: Mapping[str, float], server: judge.Server | None = None
) -> Judged:
    """Returns what each reward says of every item."""
    found = {name: named(name, server)(items) for name in weights}
    for name, parts in found.items():
        if len(parts) != len(items):
            raise ValueError(
                f"reward {name!r} returned {len(parts)} results for {len(items)} items"
            )
    return found


def joined(found: Judged, weights: Mapping[str, float]) -> list[Parts | None]:
    """Returns the weighted sum of what the rewards say of every item, and all their parts."""
    one = next(iter(found.values()))
    return [_joined({name: found[name][i] for name in found}, weights) for i in range(len(one))]


def invalid(found: Judged) -> dict[str, tuple[float, float]]:
    """Returns metrics, (items that a reward could not judge, items), by its name."""
    return {
        f"reward/{name}/invalid": (float(sum(map(_is_invalid, parts))), float(len(parts)))
        for name, parts in found.items()
    }


def _is_invalid(parts: Parts | None) -> bool:
    return parts is None or not np.isfinite(parts["total"])


def _joined(judged: Mapping[str, Parts | None], weights: Mapping[str, float]) -> Parts | None:
    total = 0.0
    named: dict[str, float] = {}
    for name, parts in judged.items():
        if parts is None or _is_invalid(parts):
            return None
        total += weights[name] * parts["total"]
        named |= {f"{name}/{part}": value for part, value in parts.items() if part != "total"}
    return {"total": total} | named
