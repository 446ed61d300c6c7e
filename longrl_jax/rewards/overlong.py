"""Soft punishment of answers that come near their longest length."""

from collections.abc import Sequence

from longrl_jax.types import Scored


def reward(items: Sequence[Scored]) -> list[dict[str, float]]:
    """Returns `total` and `punishment`: 0, falling to -1 over the last tokens of max_tokens.

    Source: arXiv:2503.14476 equation 13 (DAPO); Long-RL examples/reward_function/dapo.py. Its
    weight in rewards is theirs of overlong_penalty_factor.
    """
    return [{"total": punishment(item), "punishment": punishment(item)} for item in items]


def punishment(item: Scored) -> float:
    """Returns 0 up to max_tokens - overlong_tokens, -1 from max_tokens on, a line between them."""
    over = item.num_tokens - (item.max_tokens - item.overlong_tokens)
    return -min(max(over, 0) / item.overlong_tokens, 1.0)
