"""The optimizer against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from longrl_jax.config import OptimizerConfig
from longrl_jax.optimizer import is_matrix, learning_rate, make_optimizer


def test_warm_up_starts_above_zero_and_reaches_the_rate():
    rate = learning_rate(OptimizerConfig(learning_rate=1e-3, warmup_steps=4), 10)
    np.testing.assert_allclose(
        [rate(i) for i in range(6)], [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3], rtol=1e-6
    )


def test_cosine_ends_at_zero():
    rate = learning_rate(OptimizerConfig(learning_rate=1e-3, schedule="cosine"), 10)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [1e-3, 5e-4, 0], atol=1e-9)


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=10 leaves no step"):
        learning_rate(OptimizerConfig(warmup_steps=10), 10)


def test_decay_takes_matrices_only_and_gradients_are_clipped():
    params = {"mlp": {"kernel": jnp.ones((2, 3, 3))}, "norm": {"scale": jnp.ones((2, 3))}}
    assert is_matrix(params) == {"mlp": {"kernel": True}, "norm": {"scale": False}}
    cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1.0)
    optimizer = make_optimizer(cfg, 10)
    zero = {"mlp": {"kernel": jnp.zeros((2, 3, 3))}, "norm": {"scale": jnp.zeros((2, 3))}}
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)
