"""Advantages: how much better a sample is than the others. They run on the host, in numpy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float


def grpo(
    reward: Float[np.ndarray, "G R"], valid: Bool[np.ndarray, "G R"], *, eps: float = 1e-6
) -> Float[np.ndarray, "G R"]:
    """Centres and scales rewards inside each group of samples of one prompt.

    Source: arXiv:2402.03300 section 4.1.2; Long-RL core_algos.compute_grpo_outcome_advantage.
    The deviation is the sample one (ddof=1), as in Long-RL. An invalid reward gets 0 and leaves
    the statistics; so does a group with fewer than two valid rewards. Equal rewards get exactly 0.
    """
    if reward.shape != valid.shape:
        raise ValueError(f"rewards {reward.shape} and their validity {valid.shape} do not match")
    if reward.shape[1] < 2:
        raise ValueError(
            f"GRPO compares the answers to one prompt, but rollout.num_samples={reward.shape[1]}; "
            "use at least 2"
        )
    if not np.isfinite(reward[valid]).all():
        raise ValueError("a reward marked valid is not finite; mark it invalid")
    known_GR = np.where(valid, reward.astype(np.float64), 0)
    count_G1 = valid.sum(axis=1, keepdims=True)
    mean_G1 = known_GR.sum(axis=1, keepdims=True) / np.maximum(count_G1, 1)
    centred_GR = np.where(valid, known_GR - mean_G1, 0)
    square_G1 = np.square(centred_GR).sum(axis=1, keepdims=True)
    scaled_GR = centred_GR / (np.sqrt(square_G1 / np.maximum(count_G1 - 1, 1)) + eps)
    first_G1 = np.take_along_axis(known_GR, valid.argmax(axis=1)[:, None], axis=1)
    differ_G1 = (valid & (known_GR != first_G1)).any(axis=1, keepdims=True)  # the mean may round
    return np.where(differ_G1, scaled_GR, 0).astype(np.float32)


ADVANTAGES: dict[str, Callable[..., np.ndarray]] = {"grpo": grpo}
