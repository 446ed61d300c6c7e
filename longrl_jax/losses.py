"""Losses: token log-probabilities in, a scalar and (sum, count) statistics out.

Every entry of LOSSES is called as loss(logp, old_logp, advantage, loss_mask) and returns the mean
over the tokens of the mask; its other numbers are keywords.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longrl_jax.types import Stats

MAX_LOG_RATIO = 20.0  # exp of it stays finite in float32; the number is Long-RL's
MAX_KL = 10.0  # bound of one token's KL estimate, as in Long-RL


def clipped_surrogate(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Float[Array, ""], Stats]:
    """PPO's clipped objective with a bound on tokens of negative advantage.

    Source: arXiv:1707.06347 equation 7; dual clip arXiv:1912.09729 equation 5; Long-RL
    core_algos.compute_policy_loss (which clips the logarithm: same value). clip_fraction and
    dual_clip_fraction count the tokens whose loss a clip or the bound has changed.
    """
    log_ratio_BA = jnp.where(loss_mask, logp - old_logp, 0)  # before exp: its gradient may be nan
    ratio_BA = jnp.exp(jnp.clip(log_ratio_BA, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_BA = jnp.clip(ratio_BA, 1 - clip_low, 1 + clip_high)
    loss_BA = jnp.maximum(-advantage * ratio_BA, -advantage * clipped_BA)
    bounded_BA = jnp.where(advantage < 0, jnp.minimum(loss_BA, -advantage * clip_dual), loss_BA)
    count = loss_mask.sum()
    is_clipped_BA = -advantage * clipped_BA > -advantage * ratio_BA
    stats = {
        "clip_fraction": ((is_clipped_BA & loss_mask).sum(), count),
        "dual_clip_fraction": (((bounded_BA < loss_BA) & loss_mask).sum(), count),
        "ratio": (jnp.where(loss_mask, ratio_BA, 0).sum(), count),
    }
    return masked_mean(bounded_BA, loss_mask), stats


def nll(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
) -> tuple[Float[Array, ""], Stats]:
    """Negative log-likelihood, for fine-tuning on reference answers; advantage is a weight (1)."""
    return masked_mean(-advantage * logp, loss_mask), {}


def low_variance_kl(
    logp: Float[Array, "B A"], reference_logp: Float[Array, "B A"]
) -> Float[Array, "B A"]:
    """Estimates KL(policy || reference) for every token as exp(d) - d - 1, d = reference - policy.

    Source: J. Schulman, "Approximating KL divergence" (k3), joschu.net/blog/kl-approx.html;
    Long-RL core_algos.compute_kl, low_var_kl, with its bounds.
    """
    d_BA = jnp.clip(reference_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.clip(jnp.exp(d_BA) - d_BA - 1, -MAX_KL, MAX_KL)


def masked_mean(x: Float[Array, "B A"], mask: Bool[Array, "B A"]) -> Float[Array, ""]:
    """Mean where the mask is True; 0 where it is True nowhere."""
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


LOSSES: dict[str, Callable[..., tuple[Array, Stats]]] = {"clipped": clipped_surrogate}
KL_ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {"low_variance": low_variance_kl}
