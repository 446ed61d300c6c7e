"""Losses: token log-probabilities in, a loss of every token and (sum, count) statistics out.

Every entry of LOSSES is called as loss(logp, old_logp, advantage, loss_mask, sequence) and returns
one number a token, 0 where the mask is False; its other numbers are keywords. An entry of MEANS
says what each of them weighs, and the number that the weighted sum is divided by, both from all
passes of an update together, so that a split into passes changes nothing.

sequence: which answer of its row a slot belongs to, from 0; a row has at most num_sequences.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longrl_jax.types import Stats

MAX_LOG_RATIO = 20.0  # exp of it stays finite in float32; the number is Long-RL's
MAX_KL = 10.0  # bound of one token's KL estimate, as in Long-RL


def clipped_surrogate(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    sequence: Int[Array, "B A"] | None = None,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    num_sequences: int = 0,
) -> tuple[Float[Array, "B A"], Stats]:
    """PPO's clipped objective with a bound on tokens of negative advantage.

    Source: arXiv:1707.06347 equation 7; dual clip arXiv:1912.09729 equation 5; Long-RL
    core_algos.compute_policy_loss (which clips the logarithm: same value). clip_fraction and
    dual_clip_fraction count the tokens whose loss a clip or the bound has changed.
    """
    log_ratio_BA = jnp.where(loss_mask, logp - old_logp, 0)  # before exp: its gradient may be nan
    loss_BA, stats = _clipped(log_ratio_BA, advantage, loss_mask, clip_low, clip_high)
    bounded_BA = jnp.where(advantage < 0, jnp.minimum(loss_BA, -advantage * clip_dual), loss_BA)
    dual_clips = ((bounded_BA < loss_BA) & loss_mask).sum()
    stats |= {"dual_clip_fraction": (dual_clips, loss_mask.sum())}
    return jnp.where(loss_mask, bounded_BA, 0), stats


def gspo(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    sequence: Int[Array, "B A"],
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float = 0.0,
    num_sequences: int,
) -> tuple[Float[Array, "B A"], Stats]:
    """The clipped objective of whole answers: every token has the geometric mean of the ratios.

    Source: arXiv:2507.18071 equations 5 and 7; verl core_algos.compute_policy_loss_gspo. There is
    no dual clip in either, so clip_dual does nothing. The paper's mean is loss_mean=sequence.
    """
    log_ratio_BA = jnp.where(loss_mask, logp - old_logp, 0)
    sums_BA, counts_BA = (
        of_sequence(x_BA, sequence, num_sequences)
        for x_BA in (log_ratio_BA, loss_mask.astype(log_ratio_BA.dtype))
    )
    mean_BA = sums_BA / jnp.maximum(counts_BA, 1)
    loss_BA, stats = _clipped(mean_BA, advantage, loss_mask, clip_low, clip_high)
    return jnp.where(loss_mask, loss_BA, 0), stats


def cispo(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    sequence: Int[Array, "B A"] | None = None,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float = 0.0,
    num_sequences: int = 0,
) -> tuple[Float[Array, "B A"], Stats]:
    """REINFORCE with a clipped importance weight: no token loses its gradient to a clip.

    Source: arXiv:2506.13585 equations 4 and 5; Long-RL's successor EasyR1
    core_algos.compute_policy_loss, cispo. clip_dual does nothing.
    """
    log_ratio_BA = jnp.where(loss_mask, logp - old_logp, 0)
    ratio_BA = _ratio(log_ratio_BA)
    weight_BA = jax.lax.stop_gradient(jnp.clip(ratio_BA, 1 - clip_low, 1 + clip_high))
    count = loss_mask.sum()
    stats = {
        "clip_fraction": (((weight_BA != ratio_BA) & loss_mask).sum(), count),
        "ratio": (jnp.where(loss_mask, ratio_BA, 0).sum(), count),
    }
    known_BA = jnp.where(loss_mask, logp, 0)
    return jnp.where(loss_mask, -advantage * weight_BA * known_BA, 0), stats


def nll(
    logp: Float[Array, "B A"],
    old_logp: Float[Array, "B A"],
    advantage: Float[Array, "B A"],
    loss_mask: Bool[Array, "B A"],
    sequence: Int[Array, "B A"] | None = None,
    *,
    num_sequences: int = 0,
) -> tuple[Float[Array, "B A"], Stats]:
    """Negative log-likelihood, for fine-tuning on reference answers; advantage is a weight (1)."""
    return jnp.where(loss_mask, -advantage * logp, 0), {}


def low_variance_kl(
    logp: Float[Array, "B A"], reference_logp: Float[Array, "B A"]
) -> Float[Array, "B A"]:
    """Estimates KL(policy || reference) for every token as exp(d) - d - 1, d = reference - policy.

    Source: J. Schulman, "Approximating KL divergence" (k3), joschu.net/blog/kl-approx.html;
    Long-RL core_algos.compute_kl, low_var_kl, with its bounds.
    """
    d_BA = jnp.clip(reference_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.clip(jnp.exp(d_BA) - d_BA - 1, -MAX_KL, MAX_KL)


def log_ratio_kl(
    logp: Float[Array, "B A"], reference_logp: Float[Array, "B A"]
) -> Float[Array, "B A"]:
    """The same as policy - reference (k1): unbiased, of either sign. Its gradient as a term of the
    loss is 0 on average, whatever the reference: it is for kl_in=reward. Source: as above, kl."""
    return logp - reference_logp


def absolute_kl(
    logp: Float[Array, "B A"], reference_logp: Float[Array, "B A"]
) -> Float[Array, "B A"]:
    """The distance |policy - reference|. Source: as above, abs."""
    return jnp.abs(logp - reference_logp)


def squared_kl(
    logp: Float[Array, "B A"], reference_logp: Float[Array, "B A"]
) -> Float[Array, "B A"]:
    """Half the square of policy - reference (k2). Source: as above, mse."""
    return jnp.square(logp - reference_logp) / 2


def token_weights(
    loss_mask: Bool[Array, "n B A"],
    sequence: Int[Array, "n B A"],
    *,
    num_sequences: int,
    max_tokens: int = 0,
) -> tuple[Float[Array, "n B A"], Float[Array, ""]]:
    """Every token counts the same. Source: arXiv:2503.14476 equation 8 (DAPO)."""
    return jnp.asarray(loss_mask, float), loss_mask.sum()


def sequence_weights(
    loss_mask: Bool[Array, "n B A"],
    sequence: Int[Array, "n B A"],
    *,
    num_sequences: int,
    max_tokens: int = 0,
) -> tuple[Float[Array, "n B A"], Float[Array, ""]]:
    """Every answer counts the same: a token of a long one counts less.

    Source: arXiv:2402.03300 equation 3 (GRPO); Long-RL core_algos.average_loss, seq. An answer
    without tokens does not count.
    """
    length_nBA = of_sequence(jnp.asarray(loss_mask, float), sequence, num_sequences)
    weight_nBA = jnp.where(loss_mask, 1 / jnp.maximum(length_nBA, 1), 0)
    return weight_nBA, _num_answers(loss_mask, sequence, num_sequences)


def fixed_weights(
    loss_mask: Bool[Array, "n B A"],
    sequence: Int[Array, "n B A"],
    *,
    num_sequences: int,
    max_tokens: int,
) -> tuple[Float[Array, "n B A"], Float[Array, ""]]:
    """A sum over tokens, over answers * max_tokens: no length changes the weight of a token.

    Source: arXiv:2503.20783 appendix (Dr.GRPO's masked_mean); TRL loss_type="dr_grpo".
    """
    answers = _num_answers(loss_mask, sequence, num_sequences)
    return jnp.asarray(loss_mask, float), answers * max_tokens


def of_sequence(
    x: Float[Array, "*lead A"], sequence: Int[Array, "*lead A"], num_sequences: int
) -> Float[Array, "*lead A"]:
    """Returns for every slot the sum of x over the slots of its row with the same sequence."""
    is_in = sequence[..., None] == jnp.arange(num_sequences)  # no scatter: A may be split
    sums = jnp.where(is_in, x[..., None], 0).sum(axis=-2, keepdims=True)
    return jnp.where(is_in, sums, 0).sum(axis=-1)


def masked_mean(x: Float[Array, "B A"], mask: Bool[Array, "B A"]) -> Float[Array, ""]:
    """Mean where the mask is True; 0 where it is True nowhere."""
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def _clipped(
    log_ratio_BA: Array, advantage_BA: Array, loss_mask_BA: Array, low: float, high: float
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    ratio_BA = _ratio(log_ratio_BA)
    clipped_BA = jnp.clip(ratio_BA, 1 - low, 1 + high)
    is_clipped_BA = -advantage_BA * clipped_BA > -advantage_BA * ratio_BA
    count = loss_mask_BA.sum()
    stats = {
        "clip_fraction": ((is_clipped_BA & loss_mask_BA).sum(), count),
        "ratio": (jnp.where(loss_mask_BA, ratio_BA, 0).sum(), count),
    }
    return jnp.maximum(-advantage_BA * ratio_BA, -advantage_BA * clipped_BA), stats


def _ratio(log_ratio_BA: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio_BA, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _num_answers(loss_mask: Array, sequence: Array, num_sequences: int) -> Array:
    """Counts the answers that have a token."""
    is_in = (sequence[..., None] == jnp.arange(num_sequences)) & loss_mask[..., None]
    return is_in.any(axis=-2).sum()


LOSSES: dict[str, Callable[..., tuple[Array, Stats]]] = {
    "clipped": clipped_surrogate,
    "gspo": gspo,
    "cispo": cispo,
}
MEANS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "token": token_weights,
    "sequence": sequence_weights,
    "fixed": fixed_weights,
}
KL_ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {
    "low_variance": low_variance_kl,
    "kl": log_ratio_kl,
    "abs": absolute_kl,
    "mse": squared_kl,
}
