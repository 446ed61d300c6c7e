"""From the rewards of a group to the advantage of every sample; in numpy, a step has only a few."""

import numpy as np
from jaxtyping import Bool, Float


def grpo(
    reward: Float[np.ndarray, "G R"], valid: Bool[np.ndarray, "G R"], *, eps: float = 1e-6
) -> Float[np.ndarray, "G R"]:
    """Centres and scales rewards inside each group of samples of one prompt.

    Source: arXiv:2402.03300 section 4.1.2; Long-RL core_algos.compute_grpo_outcome_advantage.
    An invalid reward leaves its group's mean and deviation and its sample gets 0; so does a group
    of equal rewards, or with fewer than two valid ones. The deviation is the sample one (ddof=1),
    as in Long-RL.

    Raises:
        ValueError: one sample a group: there is nothing to compare with.
    """
    if reward.shape[1] < 2:
        raise ValueError(
            f"GRPO compares the samples of a prompt, but rollout.num_samples={reward.shape[1]}; "
            "use at least 2"
        )
    count_G1 = valid.sum(axis=1, keepdims=True)
    mean_G1 = np.where(valid, reward, 0).sum(axis=1, keepdims=True) / np.maximum(count_G1, 1)
    centred_GR = np.where(valid, reward - mean_G1, 0)
    variance_G1 = (centred_GR**2).sum(axis=1, keepdims=True) / np.maximum(count_G1 - 1, 1)
    return np.where(count_G1 >= 2, centred_GR / (np.sqrt(variance_G1) + eps), 0)


ADVANTAGES = {"grpo": grpo}
