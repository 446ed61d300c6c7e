"""Rewards: what an answer is worth; all samples of a step are judged at once, part by part.

A reward is called as reward(items) and returns for every item its parts by name, `total` among
them, or None where it could not judge: such a sample leaves the statistics of its group.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from longrl_jax.config import pick
from longrl_jax.rewards import math_answer, overlong, video_qa
from longrl_jax.types import Scored

Parts = Mapping[str, float]
Reward = Callable[[Sequence[Scored]], Sequence[Parts | None]]

REWARDS: dict[str, Reward] = {
    "video_qa": video_qa.reward,
    "video_accuracy": video_qa.accuracy,
    "math_answer": math_answer.reward,
    "overlong": overlong.reward,
}


def score(items: Sequence[Scored], weights: Mapping[str, float]) -> list[Parts | None]:
    """Returns for every item `total`, the weighted sum of the rewards, and "<reward>/<part>".

    weights: by name in REWARDS. None where one of the rewards could not judge the item.
    """
    judged = {name: pick(REWARDS, name, "rewards")(items) for name in weights}
    for name, parts in judged.items():
        if len(parts) != len(items):
            raise ValueError(
                f"reward {name!r} returned {len(parts)} results for {len(items)} items"
            )
    return [_joined({name: judged[name][i] for name in judged}, weights) for i in range(len(items))]


def _joined(judged: Mapping[str, Parts | None], weights: Mapping[str, float]) -> Parts | None:
    total = 0.0
    named: dict[str, float] = {}
    for name, parts in judged.items():
        if parts is None or not np.isfinite(parts["total"]):
            return None
        total += weights[name] * parts["total"]
        named |= {f"{name}/{part}": value for part, value in parts.items() if part != "total"}
    return {"total": total} | named
