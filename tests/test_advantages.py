"""GRPO's advantage against a loop over groups."""

import numpy as np
import pytest
import torch

from longrl_jax.advantages import ADVANTAGES, grpo

RTOL = 1e-12  # float64


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
    got = grpo(reward, valid)
    np.testing.assert_allclose(got, by_loop(reward, valid), rtol=RTOL)
    assert not got[:2].any()


def test_equals_long_rl():
    """(score - torch.mean) / (torch.std + 1e-6), whose deviation is the sample one."""
    reward = np.random.default_rng(1).normal(size=(4, 8))
    x = torch.tensor(reward)
    want = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
    np.testing.assert_allclose(grpo(reward, np.ones((4, 8), bool)), want.numpy(), rtol=RTOL)


def test_by_hand():
    """Rewards 1, 0, 0, 1: mean 0.5, deviation sqrt(4 * 0.25 / 3)."""
    got = grpo(np.array([[1.0, 0, 0, 1]]), np.ones((1, 4), bool))
    np.testing.assert_allclose(got, [[0.866, -0.866, -0.866, 0.866]], atol=1e-3)


def test_an_invalid_reward_has_no_say_whatever_its_value():
    reward = np.array([[1.0, 0.0, np.nan, 1.0]])
    valid = np.isfinite(reward)
    got = grpo(reward, valid)
    np.testing.assert_allclose(got[:, [0, 1, 3]], grpo(reward[:, [0, 1, 3]], valid[:, [0, 1, 3]]))
    assert got[0, 2] == 0


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3])
def test_equal_rewards_give_nothing_to_learn(value):
    """Exactly nothing: the mean of three times 0.1 is not 0.1."""
    reward, valid = np.full((2, 4), value), np.ones((2, 4), bool)
    reward[1, 0], valid[1, 0] = 5.0, False
    np.testing.assert_array_equal(grpo(reward, valid), 0)
    np.testing.assert_array_equal(grpo(reward[:, :3], np.ones((2, 3), bool))[0], 0)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.num_samples=1"):
        ADVANTAGES["grpo"](np.ones((3, 1)), np.ones((3, 1), bool))


def test_a_valid_nan_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="not finite; mark it invalid"):
        grpo(np.array([[np.nan, 1.0]]), np.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"\(1, 2\) .* \(1, 3\) do not match"):
        grpo(np.ones((1, 2)), np.ones((1, 3), bool))
