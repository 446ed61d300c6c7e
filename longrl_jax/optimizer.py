"""The optimizer: clipping, AdamW, warm-up."""

import jax
import optax

from longrl_jax.config import OptimizerConfig


def make_optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns clip by global norm, then AdamW whose decay leaves norms and biases alone."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(
            learning_rate(cfg, num_steps),
            b1=cfg.beta1,
            b2=cfg.beta2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=is_matrix,
        ),
    )


def learning_rate(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear from 0 over warmup_steps, then constant or a cosine to 0 at num_steps.

    The first update of a warm-up of n steps uses 1/n of the full rate, not 0.
    """
    if cfg.warmup_steps >= num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={cfg.warmup_steps} leaves no step of run.num_steps={num_steps}"
        )
    rest = num_steps - cfg.warmup_steps
    after = {
        "constant": optax.constant_schedule(cfg.learning_rate),
        "cosine": optax.cosine_decay_schedule(cfg.learning_rate, rest),
    }[cfg.schedule]
    if not cfg.warmup_steps:
        return after
    first = cfg.learning_rate / cfg.warmup_steps
    warm_up = optax.linear_schedule(first, cfg.learning_rate, max(cfg.warmup_steps - 1, 1))
    return optax.join_schedules([warm_up, after], [cfg.warmup_steps])


def is_matrix(params: optax.Params) -> optax.Params:
    """True where weight decay applies: everything but scales and biases, by the parameter's name.

    Stacked layers give norms and biases two dims, so the number of dims does not tell.
    """

    def decays(path: tuple, _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path)
        return "'scale'" not in name and "'bias'" not in name

    return jax.tree_util.tree_map_with_path(decays, params)
