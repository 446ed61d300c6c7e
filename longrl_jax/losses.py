"""Losses over answer slots: arrays in, a scalar and (sum, count) statistics out.

`count` is the number of loss tokens of the whole minibatch: a pass of it adds its part of the mean,
so the loss does not depend on how rows are split into passes or over devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longrl_jax.types import Stats

MAX_LOG_RATIO = 20.0
"""exp of it is finite in float32; Long-RL clamps at the same value."""
MAX_KL = 10.0
"""Long-RL's bound on the KL of one token."""


def clipped_surrogate(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    count: Float[Array, ""],
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Float[Array, ""], Stats]:
    """PPO's clipped objective with dual clip, token mean.

    Source: arXiv:1707.06347 equation 7; dual clip arXiv:1912.09729 equation 5; separate bounds
    arXiv:2503.14476; Long-RL core_algos.compute_policy_loss.
    """
    ratio_BA = jnp.exp(jnp.clip(logp - old_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_BA = jnp.clip(ratio_BA, 1 - clip_low, 1 + clip_high)
    loss_BA = jnp.maximum(-advantage * ratio_BA, -advantage * clipped_BA)
    dual_BA = jnp.where(advantage < 0, jnp.minimum(loss_BA, -advantage * clip_dual), loss_BA)
    binding_BA = -advantage * clipped_BA > -advantage * ratio_BA
    slots = loss_mask.sum()
    stats = {
        "clip_fraction": ((binding_BA & loss_mask).sum(), slots),
        "dual_clip_fraction": (((dual_BA != loss_BA) & loss_mask).sum(), slots),
        "ratio": (jnp.where(loss_mask, ratio_BA, 0).sum(), slots),
    }
    return _masked_sum(dual_BA, loss_mask) / jnp.maximum(count, 1), stats


def low_variance_kl(
    logp: Float[Array, "B A"], reference_logp: Float[Array, "B A"]
) -> Float[Array, "B A"]:
    """Unbiased, non-negative estimate of KL(policy || reference) from one sample a token.

    Source: Schulman, "Approximating KL divergence" (k3); Long-RL core_algos.compute_kl, whose
    clamps it keeps: the log ratio to +-20, the estimate to +-10.
    """
    log_ratio_BA = jnp.clip(reference_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.clip(jnp.exp(log_ratio_BA) - log_ratio_BA - 1, -MAX_KL, MAX_KL)


def kl_penalty(
    kl: Float[Array, "B A"], loss_mask: Bool[Array, "B A"], count: Float[Array, ""]
) -> tuple[Float[Array, ""], Stats]:
    """Token mean of a KL estimate."""
    total = _masked_sum(kl, loss_mask)
    return total / jnp.maximum(count, 1), {"kl": (total, loss_mask.sum())}


def nll(
    logp: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    count: Float[Array, ""],
) -> tuple[Float[Array, ""], Stats]:
    """Negative log-likelihood of the targets, token mean: the loss of SFT."""
    total = -_masked_sum(logp, loss_mask)
    return total / jnp.maximum(count, 1), {"nll": (total, loss_mask.sum())}


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, x, 0).sum()  # where, not times: nan * 0 is nan


LOSSES = {"clipped": clipped_surrogate}
KL_ESTIMATORS = {"low_variance": low_variance_kl}
