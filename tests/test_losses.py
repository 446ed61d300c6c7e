"""Losses against loops over tokens, and their gradients against torch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from longrl_jax import losses

RTOL = 1e-5  # float32 sums in another order
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0}
CLIPPED = functools.partial(losses.clipped_surrogate, **CLIP)


def mean(loss, *arrays):
    """The mean over the tokens of the mask, and the statistics."""
    each, stats = loss(*arrays)
    return losses.masked_mean(each, arrays[3]), stats


def tokens(seed=0, shape=(3, 11)):
    rng = np.random.default_rng(seed)
    logp, old = rng.normal(-1, 1, shape), rng.normal(-1, 1, shape)
    logp[0, :3], old[0, :3] = [-80.0, 0.0, -5.0], [0.0, -80.0, -5.0]  # ratios past the clamp
    mask = rng.random(shape) > 0.4
    mask[0, :3] = True
    arrays = (x.astype(np.float32) for x in (logp, old, rng.normal(size=shape)))
    return *arrays, mask


def test_clipped_surrogate_equals_a_loop():
    logp, old, advantage, mask = tokens()
    total, clipped, dual, ratios = 0.0, 0, 0, 0.0
    for i in zip(*np.nonzero(mask), strict=True):
        A, ratio = float(advantage[i]), math.exp(min(max(float(logp[i]) - float(old[i]), -20), 20))
        bound = min(max(ratio, 1 - 0.2), 1 + 0.28)
        loss = max(-A * ratio, -A * bound)
        clipped += -A * bound > -A * ratio
        if A < 0 and loss > -A * 3.0:
            loss, dual = -A * 3.0, dual + 1
        total, ratios = total + loss, ratios + ratio
    loss, stats = mean(CLIPPED, logp, old, advantage, mask)
    np.testing.assert_allclose(loss, total / mask.sum(), rtol=RTOL)
    assert stats["clip_fraction"] == (clipped, mask.sum()) and clipped
    assert stats["dual_clip_fraction"] == (dual, mask.sum()) and dual
    np.testing.assert_allclose(stats["ratio"][0], ratios, rtol=RTOL)


def test_gradient_of_the_clipped_surrogate_equals_torch():
    """Written as Long-RL writes it: the logarithm of the ratio is clipped."""
    logp, old, advantage, mask = tokens(4, (6, 50))
    logp[0, :3] = old[0, :3] = -1.0  # torch lets a gradient pass at the edge of a clamp
    x = torch.tensor(logp, requires_grad=True)
    A, m = torch.tensor(advantage), torch.tensor(mask)
    log_ratio = x - torch.tensor(old)
    inside = torch.exp(torch.clamp(log_ratio, math.log(1 - 0.2), math.log(1 + 0.28)))
    higher = torch.max(-A * torch.exp(log_ratio), -A * inside)
    bounded = torch.where(A < 0, torch.min(higher, -A * 3.0), higher)
    loss = (bounded * m).sum() / m.sum()
    loss.backward()

    def ours(logp):
        return mean(CLIPPED, logp, old, advantage, mask)[0]

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logp))
    np.testing.assert_allclose(value, loss.item(), rtol=RTOL)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=RTOL, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "want"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.56),  # gain is cut at 1.28
        (0.5, 2.0, -1.0),  # a loss is not
        (1.5, -2.0, 3.0),
        (0.5, -2.0, 1.6),  # gain is cut at 0.8
        (5.0, -2.0, 6.0),  # dual clip: 3 times the advantage
        (5.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, want):
    logp = jnp.log(jnp.full((1, 1), ratio))
    A, mask = jnp.full((1, 1), advantage), jnp.ones((1, 1), bool)
    loss, _ = mean(CLIPPED, logp, jnp.zeros((1, 1)), A, mask)
    np.testing.assert_allclose(loss, want, rtol=RTOL)


def test_nll_is_the_mean_of_the_tokens_that_count():
    logp, old, _, mask = tokens(2)
    loss, stats = mean(losses.nll, logp, old, np.ones_like(logp), mask)
    np.testing.assert_allclose(loss, np.mean([-logp[i] for i in zip(*mask.nonzero(), strict=True)]))
    assert stats == {}


def test_low_variance_kl_equals_a_loop_and_is_never_negative():
    logp, reference, _, _ = tokens(1)
    want = np.empty(logp.shape)
    for i in np.ndindex(logp.shape):
        d = min(max(float(reference[i]) - float(logp[i]), -20), 20)
        want[i] = min(math.exp(d) - d - 1, 10)
    got = losses.low_variance_kl(jnp.asarray(logp), jnp.asarray(reference))
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=1e-6)
    assert (got >= 0).all()


def test_low_variance_kl_estimates_the_divergence():
    """Its mean over tokens of the policy is the KL divergence, by the formula over all tokens."""
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.full(20, 5.0), 2)
    drawn = rng.choice(20, 200_000, p=p)
    got = losses.low_variance_kl(np.log(p)[drawn][None], np.log(q)[drawn][None]).mean()
    np.testing.assert_allclose(got, (p * np.log(p / q)).sum(), rtol=0.02)  # 200,000 draws


@pytest.mark.parametrize("name", [*losses.LOSSES, "nll"])
def test_what_is_masked_has_no_say(name):
    """Nor has another answer of the row in a ratio of whole answers."""
    options = CLIP if name in losses.LOSSES else {}
    loss = functools.partial(losses.LOSSES.get(name, losses.nll), num_sequences=2, **options)
    logp, old, advantage, mask = tokens(3)
    sequence = np.arange(mask.shape[1])[None] // 6 * np.ones((3, 1), int)
    want = loss(logp, old, advantage, mask, sequence)[0]
    logp[~mask] = old[~mask] = np.nan

    def value(logp, mask):
        return loss(logp, old, advantage, mask, sequence)[0].sum()

    np.testing.assert_allclose(value(logp, mask), want.sum(), rtol=RTOL)
    assert not np.asarray(jax.grad(value)(jnp.asarray(logp), mask))[~mask].any()
    assert value(logp, np.zeros_like(mask)) == 0
    first = jax.grad(lambda logp: loss(logp, old, advantage, mask, sequence)[0][:, :6].sum())
    assert not np.asarray(first(jnp.asarray(logp)))[:, 6:].any()
