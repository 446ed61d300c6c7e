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
Weights = Mapping[str, float]
"""By the names that `named` takes."""
Judged = Sequence[Mapping[str, Parts | None]]
"""Of every item: what its rewards say of it, by their names."""

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


def named(name: str, server: judge.Server | None = None, *, key: str = "rewards") -> Reward:
    """Returns the reward of a name: in REWARDS, or a person's own module:function.

    server: of the reward `judge`. Raises ValueError for a name that says neither; key: of the
    config, where it stands.
    """
    if own.MARK in name:
        own.load(name)
        return functools.partial(own.judge, name)
    reward = pick(REWARDS, name, key)
    return functools.partial(judge.reward, server=server) if reward is judge.reward else reward


def score(
    items: Sequence[Scored], weights: Weights, server: judge.Server | None = None
) -> list[Parts | None]:
    """Returns for every item `total`, the weighted sum of the rewards, and "<reward>/<part>".

    None where one of the rewards could not judge the item.
    """
    every = [weights] * len(items)
    return joined(judged(items, every, server), every)


def judged(
    items: Sequence[Scored], weights: Sequence[Weights], server: judge.Server | None = None
) -> Judged:
    """Returns what the rewards of every item, those that its weights name, say of it.

    A reward is asked once, about all items that it judges.
    """
    found: list[dict[str, Parts | None]] = [{} for _ in items]
    for name in dict.fromkeys(name for one in weights for name in one):
        places = [i for i, one in enumerate(weights) if name in one]
        results = named(name, server)([items[i] for i in places])
        if len(results) != len(places):
            raise ValueError(
                f"reward {name!r} returned {len(results)} results for {len(places)} items"
            )
        for i, parts in zip(places, results, strict=True):
            found[i][name] = parts
    return found


def joined(found: Judged, weights: Sequence[Weights]) -> list[Parts | None]:
    """Returns for every item the weighted sum of what its rewards say of it, and their parts."""
    return [_joined(one, given) for one, given in zip(found, weights, strict=True)]


def invalid(found: Judged) -> dict[str, tuple[float, float]]:
    """Returns metrics, (items that a reward could not judge, items that it was to), by its name."""
    counts: dict[str, tuple[float, float]] = {}
    for one in found:
        for name, parts in one.items():
            num_invalid, count = counts.get(f"reward/{name}/invalid", (0.0, 0.0))
            counts[f"reward/{name}/invalid"] = num_invalid + _is_invalid(parts), count + 1
    return counts


def _is_invalid(parts: Parts | None) -> bool:
    return parts is None or not np.isfinite(parts["total"])


def _joined(found: Mapping[str, Parts | None], weights: Weights) -> Parts | None:
    total = 0.0
    named: dict[str, float] = {}
    for name, weight in weights.items():  # in their order, whatever else was judged with the item
        parts = found[name]
        if parts is None or _is_invalid(parts):
            return None
        total += weight * parts["total"]
        named |= {f"{name}/{part}": value for part, value in parts.items() if part != "total"}
    return {"total": total} | named
