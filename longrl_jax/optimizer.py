"""The optimizer: AdamW behind a clip of the global gradient norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from longrl_jax.config import OptimizerConfig

UNDECAYED = ("scale", "bias")
"""Last names of parameters without weight decay. Stacked layers give them two dims, so the number
of dims does not tell them from matrices."""


def make_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns step (from 0) -> learning rate: linear warm-up, then constant or cosine to 0.

    The first of n warm-up steps has 1/n of the full rate, not 0.
    """
    if cfg.warmup_steps > num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={cfg.warmup_steps} is longer than run.num_steps={num_steps}; "
            "lower it, or the full rate is never reached"
        )

    def schedule(step: Any) -> jax.Array:
        warmed = jnp.minimum((step + 1) / max(cfg.warmup_steps, 1), 1)
        if cfg.schedule == "constant":
            return cfg.learning_rate * warmed
        done = (step - cfg.warmup_steps) / max(num_steps - cfg.warmup_steps, 1)
        return cfg.learning_rate * warmed * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))) / 2

    return schedule


def make_optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns clip, then AdamW (arXiv:1711.05101) whose decay spares norms and biases."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(
            make_schedule(cfg, num_steps),
            b1=cfg.beta1,
            b2=cfg.beta2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=is_decayed,
        ),
    )


def is_decayed(params: Any) -> Any:
    """Returns the same tree with True at matrices and token tables."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_vector(path), params)


def _is_vector(path: tuple[Any, ...]) -> bool:
    return any(f"'{name}'" in jax.tree_util.keystr(path[-2:]) for name in UNDECAYED)
