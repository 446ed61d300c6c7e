"""The optimizer against torch, its formula, and a real model's parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from longrl_jax.config import OptimizerConfig
from longrl_jax.models import decoder, weights
from longrl_jax.models.rope import Rope
from longrl_jax.optimizer import is_decayed, make_optimizer, make_schedule

RTOL = 1e-5  # float32, three updates


def rates(steps, num_steps=10, **options):
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-3, **options), num_steps)
    return [float(schedule(jnp.asarray(i))) for i in steps]


def test_warm_up_starts_above_zero_and_reaches_the_rate():
    want = [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3]
    np.testing.assert_allclose(rates(range(6), warmup_steps=4), want, rtol=RTOL)
    assert rates([0, 9]) == pytest.approx([1e-3, 1e-3])


def test_cosine_falls_to_zero_after_the_warm_up():
    got = rates([0, 5, 10, 12], schedule="cosine")
    np.testing.assert_allclose(got, [1e-3, 5e-4, 0, 0], atol=1e-9)
    got = rates([0, 1, 2, 6, 10], schedule="cosine", warmup_steps=2)
    np.testing.assert_allclose(got, [5e-4, 1e-3, 1e-3, 5e-4, 0], atol=1e-9)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps=11 is longer than run.num_steps=10"):
        rates([0], warmup_steps=11)


def test_three_updates_equal_torch():
    """AdamW with decay on the matrix only, behind clip_grad_norm_ over both arrays."""
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    start = {name: x.astype(np.float32) for name, x in start.items()}
    cfg = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, weight_decay=0.3, max_grad_norm=2.0, beta1=0.8,
        beta2=0.95, eps=1e-6,
    )  # fmt: skip
    optimizer = make_optimizer(cfg, 10)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    options = {"betas": (0.8, 0.95), "eps": 1e-6}
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": 0.3},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        **options,
    )
    for step, scale in enumerate([10.0, 0.1, 1.0]):  # clipped, not clipped, clipped
        grads = {n: (scale * rng.normal(size=x.shape)).astype(np.float32) for n, x in start.items()}
        changes, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        for name, x in theirs.items():
            x.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 2.0)
        for group in torch_optimizer.param_groups:
            group["lr"] = [0.05, 0.1, 0.1][step]
        torch_optimizer.step()
        for name in start:
            np.testing.assert_allclose(params[name], theirs[name].detach().numpy(), rtol=RTOL)


def test_decay_takes_matrices_of_a_real_model():
    cfg = decoder.Config(
        vocab_size=16, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        mlp_width=32, norm_eps=1e-6, rope=Rope(theta=1e4), tied=False,
    )  # fmt: skip
    params = nnx.state(nnx.eval_shape(lambda: decoder.Model(cfg, rngs=nnx.Rngs(0))))
    decayed = weights.by_path(is_decayed(params))
    spared = {path for path, value in decayed.items() if not value}
    assert spared == {
        "text.norm.scale", "text.layers.norm1.scale", "text.layers.norm2.scale",
        "text.layers.attn.q.bias", "text.layers.attn.k.bias", "text.layers.attn.v.bias",
    }  # fmt: skip
    assert decayed["text.layers.mlp.up.kernel"] and decayed["text.table"]


def test_every_field_of_the_config_has_an_effect():
    """A field that is read nowhere would be a switch that does nothing."""
    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    grads = [{"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)} for _ in range(2)]

    def after(cfg):
        optimizer, now = make_optimizer(cfg, 10), params
        state = optimizer.init(now)
        for g in grads:
            changes, state = optimizer.update(g, state, now)
            now = jax.tree.map(jnp.add, now, changes)
        return now["kernel"]

    start = OptimizerConfig(learning_rate=0.1)
    other = {
        "learning_rate": 0.2, "warmup_steps": 5, "schedule": "cosine", "weight_decay": 0.1,
        "max_grad_norm": 1e-7, "beta1": 0.5, "beta2": 0.5, "eps": 1e-2,
    }  # fmt: skip
    assert other.keys() == {f.name for f in dataclasses.fields(OptimizerConfig)}
    want = after(start)
    for name, value in other.items():
        got = after(dataclasses.replace(start, **{name: value}))
        assert not np.allclose(got, want, rtol=1e-4), name
