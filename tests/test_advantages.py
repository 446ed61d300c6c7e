"""GRPO's advantage against a loop over groups."""

import numpy as np
import pytest

from longrl_jax.advantages import grpo

RTOL = 1e-12  # the same float64 arithmetic in another order


def by_loop(reward, valid):
    out = np.zeros_like(reward)
    for g in range(len(reward)):
        values = [r for r, ok in zip(reward[g], valid[g], strict=True) if ok]
        if len(values) < 2:
            continue
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        for r in range(reward.shape[1]):
            if valid[g, r]:
                out[g, r] = (reward[g, r] - mean) / (std + 1e-6)
    return out


def test_equals_a_loop_with_invalid_rewards():
    rng = np.random.default_rng(0)
    reward, valid = rng.normal(size=(7, 5)), rng.random((7, 5)) > 0.3
    valid[0] = False
    valid[1] = [True, False, False, False, False]
    np.testing.assert_allclose(grpo(reward, valid), by_loop(reward, valid), rtol=RTOL)


def test_an_invalid_reward_has_no_say_whatever_its_value():
    reward = np.array([[1.0, 0.0, np.nan, 1.0]])
    valid = np.isfinite(reward)
    got = grpo(reward, valid)
    np.testing.assert_allclose(got[:, [0, 1, 3]], grpo(reward[:, [0, 1, 3]], valid[:, [0, 1, 3]]))
    assert got[0, 2] == 0


def test_equal_rewards_give_nothing_to_learn():
    np.testing.assert_array_equal(grpo(np.full((2, 4), 0.7), np.ones((2, 4), bool)), 0)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.num_samples=1"):
        grpo(np.ones((3, 1)), np.ones((3, 1), bool))
