"""Losses against loops over tokens."""

import math

import jax.numpy as jnp
import numpy as np

from longrl_jax import losses

RTOL = 1e-5  # float32 sums in another order
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0}


def tokens(seed=0, shape=(3, 11)):
    rng = np.random.default_rng(seed)
    logp, old = rng.normal(-1, 1, shape), rng.normal(-1, 1, shape)
    logp[0, :3], old[0, :3] = [-80.0, 0.0, -5.0], [0.0, -80.0, -5.0]  # ratios past the clamp
    mask = rng.random(shape) > 0.4
    mask[0, :3] = True
    return logp, old, rng.normal(size=shape), mask


def test_clipped_surrogate_equals_a_loop():
    logp, old, advantage, mask = tokens()
    total, clipped, dual = 0.0, 0, 0
    for i in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(min(max(logp[i] - old[i], -20), 20))
        bound = min(max(ratio, 1 - 0.2), 1 + 0.28)
        loss = max(-advantage[i] * ratio, -advantage[i] * bound)
        clipped += -advantage[i] * bound > -advantage[i] * ratio
        if advantage[i] < 0 and -advantage[i] * 3.0 < loss:
            loss, dual = -advantage[i] * 3.0, dual + 1
        total += loss
    arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, advantage)]
    loss, stats = losses.clipped_surrogate(*arrays, jnp.asarray(mask), 40.0, **CLIP)
    np.testing.assert_allclose(loss, total / 40, rtol=RTOL)
    assert stats["clip_fraction"] == (clipped, mask.sum()) and clipped
    assert stats["dual_clip_fraction"] == (dual, mask.sum()) and dual


def test_low_variance_kl_equals_a_loop_and_is_never_negative():
    logp, reference, _, _ = tokens(1)
    want = np.empty_like(logp)
    for i in np.ndindex(logp.shape):
        d = min(max(reference[i] - logp[i], -20), 20)
        want[i] = min(math.exp(d) - d - 1, 10)
    got = losses.low_variance_kl(jnp.asarray(logp), jnp.asarray(reference))
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=1e-6)
    assert (got >= 0).all()


def test_passes_add_up_to_the_whole_minibatch():
    logp, _, _, mask = tokens(2)
    whole, _ = losses.nll(logp, mask, mask.sum())
    parts = [losses.nll(logp[i : i + 1], mask[i : i + 1], mask.sum())[0] for i in range(3)]
    np.testing.assert_allclose(sum(parts), whole, rtol=RTOL)
    np.testing.assert_allclose(whole, -logp[mask].mean(), rtol=RTOL)


def test_a_masked_nan_and_an_empty_mask_do_no_harm():
    logp, old, advantage, mask = tokens(3)
    logp[~mask] = np.nan
    loss, _ = losses.clipped_surrogate(logp, old, advantage, mask, mask.sum(), **CLIP)
    assert np.isfinite(loss)
    loss, _ = losses.nll(logp, np.zeros_like(mask), 0)
    assert loss == 0
