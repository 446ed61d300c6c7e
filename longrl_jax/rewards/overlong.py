"""Soft punishment of answers that come near their longest length."""

from collections.abc import Sequence

from longrl_jax.types import Scored


def reward(items: Sequence[Scored]) -> list[dict[str, float]]:
    """Returns `total`: 0, falling to -1 over the last overlong_tokens of max_tokens.

    Source: arXiv:2503.14476 equation 13 (DAPO); Long-RL examples/reward_function/dapo.py. Its
    weight in rewards is theirs of overlong_penalty_factor.
    """
    return [{"total": punishment(item)} for item in items]


def punishment(item: Scored) -> float:
    free = item.max_tokens - item.overlong_tokens
    if item.num_tokens <= free:
        return 0.0
    return (
        max((free - item.num_tokens) / item.overlong_tokens, -1.0) if item.overlong_tokens else -1.0
    )
