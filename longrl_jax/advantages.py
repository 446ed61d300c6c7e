"""Advantages: how much better a sample is than others. They run on the host, in numpy.

Every entry of ADVANTAGES is called as advantage(reward, valid, num_tokens) with all groups of a
step, those of all processes, and returns what each token of a sample is worth, in float64. An
invalid reward gets 0 and leaves the statistics. Equal rewards get exactly 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

WHITEN_EPS = 1e-8
"""Added to a variance, as in Long-RL and verl (masked_whiten)."""


def grpo(
    reward: Float[np.ndarray, "G R"],
    valid: Bool[np.ndarray, "G R"],
    num_tokens: Int[np.ndarray, "G R"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[np.ndarray, "G R"]:
    """Centres and scales rewards inside each group of samples of one prompt.

    Source: arXiv:2402.03300 section 4.1.2; Long-RL core_algos.compute_grpo_outcome_advantage.
    The deviation is the sample one (ddof=1), as in Long-RL. A group with fewer than two valid
    rewards gets 0.
    """
    centred_GR = dr_grpo(reward, valid)
    count_G1 = valid.sum(axis=1, keepdims=True)
    square_G1 = np.square(centred_GR).sum(axis=1, keepdims=True)
    return centred_GR / (np.sqrt(square_G1 / np.maximum(count_G1 - 1, 1)) + eps)


def dr_grpo(
    reward: Float[np.ndarray, "G R"],
    valid: Bool[np.ndarray, "G R"],
    num_tokens: Int[np.ndarray, "G R"] | None = None,
) -> Float[np.ndarray, "G R"]:
    """Centres rewards inside each group and leaves their scale: GRPO without the deviation.

    Source: arXiv:2503.20783 section 3 (its loss is loss_mean=fixed).
    """
    _check(reward, valid)
    if reward.shape[1] < 2:
        raise ValueError(
            f"the answers to one prompt are compared, but rollout.num_samples={reward.shape[1]}; "
            "use at least 2"
        )
    known_GR = np.where(valid, reward.astype(np.float64), 0)
    count_G1 = valid.sum(axis=1, keepdims=True)
    mean_G1 = known_GR.sum(axis=1, keepdims=True) / np.maximum(count_G1, 1)
    first_G1 = np.take_along_axis(known_GR, valid.argmax(axis=1)[:, None], axis=1)
    differ_G1 = (valid & (known_GR != first_G1)).any(axis=1, keepdims=True)  # the mean may round
    return np.where(valid & differ_G1, known_GR - mean_G1, 0)


def rloo(
    reward: Float[np.ndarray, "G R"],
    valid: Bool[np.ndarray, "G R"],
    num_tokens: Int[np.ndarray, "G R"] | None = None,
) -> Float[np.ndarray, "G R"]:
    """Compares a reward with the mean of the others of its group.

    Source: arXiv:2402.14740 equation 8; Long-RL core_algos.compute_rloo_outcome_advantage. That is
    the distance to the mean of all n, times n / (n - 1).
    """
    count_G1 = valid.sum(axis=1, keepdims=True)
    return dr_grpo(reward, valid) * (count_G1 / np.maximum(count_G1 - 1, 1))


def reinforce_plus_plus(
    reward: Float[np.ndarray, "G R"],
    valid: Bool[np.ndarray, "G R"],
    num_tokens: Int[np.ndarray, "G R"],
) -> Float[np.ndarray, "G R"]:
    """Whitens rewards over all tokens of the step: a long sample has more say in the statistics.

    Source: arXiv:2501.03262; Long-RL core_algos.compute_reinforce_plus_plus_outcome_advantage with
    its discount of 1. With a KL term in the reward: reinforce_plus_plus_tokens.
    """
    _check(reward, valid)
    return _whitened(reward, np.where(valid, num_tokens, 0))


def reinforce_plus_plus_baseline(
    reward: Float[np.ndarray, "G R"],
    valid: Bool[np.ndarray, "G R"],
    num_tokens: Int[np.ndarray, "G R"],
) -> Float[np.ndarray, "G R"]:
    """The same of rewards less the mean of their group.

    Source: arXiv:2501.03262 (REINFORCE++-baseline); verl
    core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage.
    """
    return _whitened(dr_grpo(reward, valid), np.where(valid, num_tokens, 0))


def reinforce_plus_plus_tokens(
    reward: Float[np.ndarray, " N"],
    valid: Bool[np.ndarray, " N"],
    kl: Sequence[Float[np.ndarray, " n"]],
    *,
    coefficient: float,
    everywhere: Callable[[float], float] = float,
) -> list[Float[np.ndarray, " n"]]:
    """REINFORCE++ whose reward of a token is -coefficient * kl, that of the sample at the last one.

    A token is worth the sum of the rewards from it on, whitened over all tokens of the step.
    Source: as reinforce_plus_plus; Long-RL core_algos.compute_rewards. An invalid sample gets 0.
    everywhere: adds a number of this process's samples up over all processes, which all call it.
    """
    returns = [
        value - coefficient * np.cumsum(kl_n[::-1].astype(np.float64))[::-1]
        for value, kl_n in zip(np.where(valid, reward, 0).tolist(), kl, strict=True)
    ]
    known = [x for x, is_known in zip(returns, valid, strict=True) if is_known]
    flat = np.concatenate([np.zeros(0), *known])
    count = everywhere(float(flat.size))
    mean = everywhere(float(flat.sum())) / max(count, 1)
    square = everywhere(float(np.square(flat - mean).sum()))
    scale = 1 / np.sqrt(square / max(count - 1, 1) + WHITEN_EPS)
    return [
        (x - mean) * scale if is_known else np.zeros(len(x))
        for x, is_known in zip(returns, valid, strict=True)
    ]


def _whitened(
    value_GR: Float[np.ndarray, "G R"], weight_GR: Int[np.ndarray, "G R"]
) -> Float[np.ndarray, "G R"]:
    """Centres and scales values that count weight times each; 0 where the weight is 0."""
    counts_GR = weight_GR > 0
    known = value_GR[counts_GR].astype(np.float64)
    weight = weight_GR[counts_GR]
    out_GR = np.zeros(value_GR.shape)
    if not known.size or (known == known[0]).all():  # the mean may round
        return out_GR
    count = weight.sum()
    centred = known - (known * weight).sum() / count
    variance = (np.square(centred) * weight).sum() / max(count - 1, 1)
    out_GR[counts_GR] = centred / np.sqrt(variance + WHITEN_EPS)
    return out_GR


def _check(reward: Float[np.ndarray, "G R"], valid: Bool[np.ndarray, "G R"]) -> None:
    if reward.shape != valid.shape:
        raise ValueError(f"rewards {reward.shape} and their validity {valid.shape} do not match")
    if not np.isfinite(reward[valid]).all():
        raise ValueError("a reward marked valid is not finite; mark it invalid")


ADVANTAGES: dict[str, Callable[..., np.ndarray]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
